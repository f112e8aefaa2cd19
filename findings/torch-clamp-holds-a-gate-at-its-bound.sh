#!/usr/bin/env bash
# A weight that starts on a bound of its own clamp learns with torch 2.13 and not with torch 2.14.
#
# `clamp` passed a gradient of 1 at its bounds until 2.13, and passes 0 from 2.14 on; `hardtanh`,
# its twin, always passed 0. Values do not change, so nothing shows but the training: a gate that
# starts at 1.0, read as `gate.clamp(0, 1)`, stays there for good. Which of the spellings one has
# matters too: bounds given as tensors pass a half in 2.14, as `torch.minimum` does in both. The
# clipped loss of PPO has half of its slope where the ratio lies on the clip's bound, and all of it
# in 2.13.
#
# Seen with Python 3.11, CPU, after 100 steps of SGD towards 0.3 from 1.0:
#                             2.13.0    2.14.1
#   gate.clamp(0, 1)           0.300     1.000
#   clamp, bounds as tensors   0.300     0.300
#   slope of it at 1.0           1.0       0.5
#   slope of PPO at 1.2         -1.0      -0.5
#   hardtanh(gate, 0, 1)       1.000     1.000
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 2.13.0 2.14.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "torch==$version" numpy==2.4.6
done
cat > "$folder/gate.py" <<'PYTHON'
import sys

import torch
from torch.nn.functional import hardtanh

ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)


def trained(read):
    """Where 100 steps towards 0.3 bring a gate that starts at its upper bound."""
    gate = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([gate], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (read(gate) - 0.3).square().backward()
        optimizer.step()
    return round(gate.item(), 3)


def slope(function, at):
    point = torch.tensor(at, requires_grad=True)
    (found,) = torch.autograd.grad(function(point), point)
    return found.item()


found = {
    "gate.clamp(0, 1)": trained(lambda gate: gate.clamp(0, 1)),
    "clamp, bounds as tensors": trained(lambda gate: gate.clamp(ZERO, ONE)),
    "slope of it at 1.0": slope(lambda x: x.clamp(ZERO, ONE), 1.0),
    "slope of PPO at 1.2": slope(lambda ratio: -torch.minimum(ratio, ratio.clamp(0.8, 1.2)), 1.2),
    "hardtanh(gate, 0, 1)": trained(lambda gate: hardtanh(gate, 0, 1)),
}
print(f"torch {torch.__version__}")
for name, value in found.items():
    print(f"  {name:26} {value}")
wanted = {"2.13.0": [0.3, 0.3, 1.0, -1.0, 1.0], "2.14.1": [1.0, 0.3, 0.5, -0.5, 1.0]}
sys.exit(list(found.values()) != wanted[sys.argv[1]])
PYTHON
for version in 2.13.0 2.14.1; do
  "$folder/$version/bin/python" "$folder/gate.py" "$version"
done
