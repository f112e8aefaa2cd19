#!/usr/bin/env bash
# On a CPU, the norm of a large float32 tensor is too small: by 7 % for the size of an embedding.
#
# `x.square().sum()` adds up in pairs and has seven digits at any length. `torch.linalg.vector_norm`
# adds up in a few running float32 sums, and once these are large, each square is rounded against
# them. No thread helps. `clip_grad_norm_` relies on it, so a gradient clipped to 1 has a norm above
# 1, and the norm that a run logs is too low. The error grows with the number of entries in one
# tensor, not with their size.
#
# Seen with torch 2.13.0 (CPU, AVX-512), Python 3.11, normal entries, against float64:
#     1,000,000 entries  vector_norm -0.001%  square().sum().sqrt() +0.000%
#   100,000,000 entries  vector_norm -1.099%  square().sum().sqrt() +0.000%
#   151,936 x 2,560      vector_norm -7.036%; clipped to 1, its norm is 1.0757
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


def exact(x):
    """The norm, computed in float64."""
    return sum(part.double().square().sum().item() for part in x.flatten().split(10**7)) ** 0.5


print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
torch.manual_seed(0)
off = {}
for entries in (10**6, 10**8):
    x = torch.randn(entries)
    off[entries] = torch.linalg.vector_norm(x).item() / exact(x) - 1
    summed = x.square().sum().sqrt().item() / exact(x) - 1
    print(f"{entries:11,} entries  vector_norm {off[entries]:+.3%}  "
          f"square().sum().sqrt() {summed:+.3%}")
weight = torch.nn.Parameter(torch.empty(151_936, 2_560))  # never read
weight.grad = torch.randn(weight.shape)
before = exact(weight.grad)
large = torch.nn.utils.clip_grad_norm_([weight], 1.0).item() / before - 1
after = exact(weight.grad)
print(f"151,936 x 2,560      vector_norm {large:+.3%}; clipped to 1, its norm is {after:.4f}")
same = abs(off[10**6]) < 1e-3 and off[10**8] < -2e-3 and abs(summed) < 1e-5 and after > 1.01
sys.exit(0 if same else 1)
PYTHON
