#!/usr/bin/env bash
# `Categorical(probs=p).log_prob` never falls below -15.94 in float32.
#
# One would expect the logarithm of p. torch clamps probabilities to the precision of the dtype,
# 1.2e-7, before it takes logarithms: an event of probability 1e-10 gets -15.94 nats instead of
# -23.03, and an impossible one the same finite figure. An importance ratio of two policies is then
# 1 for any two events below the floor. `Categorical(logits=p.log())` has none.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, for probabilities of 1, 1e-10 and 0:
#   log      [0.0, -23.03, -inf]
#   probs=   [-0.0, -15.94, -15.94]
#   logits=  [0.0, -23.03, -inf]
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
from torch.distributions import Categorical

probs = torch.tensor([1 - 1e-10, 1e-10, 0.0], dtype=torch.float64).float()
events = torch.arange(3)
from_probs = Categorical(probs=probs).log_prob(events)
from_logits = Categorical(logits=probs.log()).log_prob(events)
print(f"torch {torch.__version__}")
for name, value in (("log", probs.log()), ("probs=", from_probs), ("logits=", from_logits)):
    print(f"{name:8} {[round(v, 2) for v in value.tolist()]}")
same = (
    from_probs[1] == from_probs[2] and abs(from_probs[1] + 15.94) < 0.01
    and abs(from_logits[1] + 23.03) < 0.01 and from_logits[2] == -float("inf")
)
sys.exit(0 if same else 1)
PYTHON
