#!/usr/bin/env bash
# `torch.rand` in bfloat16 is exactly 0 once in 512 draws.
#
# bfloat16 has as many tiny numbers as float32, so one would expect zeros to be as rare. The draw is
# made of few bits and rounded to the grid of its largest values: the mean is low by 1/512, and an
# event of probability p happens at least once in 512. `torch.rand_like(p) < p`, the acceptance of
# speculative decoding, takes what it should take once in a million, and Gumbel noise from such
# draws has infinities. `torch.bernoulli` of a bfloat16 tensor keeps its rate. float16: 1 in 4,096.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, ten million draws:
#   float32   one zero in 10,000,000  mean 0.49998  u < 1e-6: 9.0e-07  bernoulli(1e-4): 9.8e-05
#   float16   one zero in      4,226  mean 0.49977  u < 1e-6: 2.4e-04  bernoulli(1e-4): 9.5e-05
#   bfloat16  one zero in        512  mean 0.49803  u < 1e-6: 2.0e-03  bernoulli(1e-4): 9.8e-05
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
DRAWS = 10_000_000
accepted = {}
print(f"torch {torch.__version__}")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    draws = torch.rand(DRAWS, dtype=dtype)
    zeros = int((draws == 0).sum())
    rare = torch.tensor(1e-6, dtype=dtype)
    accepted[dtype] = (draws < rare).float().mean().item()
    chance = torch.full((DRAWS,), 1e-4, dtype=dtype)
    kept = chance.bernoulli().float().mean().item()
    print(f"{str(dtype)[6:]:8}  one zero in {DRAWS // max(zeros, 1):10,}  "
          f"mean {draws.double().mean():.5f}  u < 1e-6: {accepted[dtype]:.1e}  "
          f"bernoulli(1e-4): {kept:.1e}")
same = (
    accepted[torch.float32] < 1e-5
    and 1e-4 < accepted[torch.float16] < 5e-4
    and 1e-3 < accepted[torch.bfloat16] < 4e-3
)
sys.exit(0 if same else 1)
PYTHON
