#!/usr/bin/env bash
# `load_state_dict(assign=True)` makes two parameters of a tied weight: two steps in one.
#
# A state dict of a tied model names the weight twice. Copied, it stays one parameter. Assigned,
# each name becomes a parameter of its own over the same storage. The values agree, so the outputs
# are right and a look at the data pointers finds nothing wrong. But the optimizer now has two
# states for one tensor, each with a part of the gradient, and applies both. Tie the weights again
# after loading.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, a step of Adam with lr 0.1:
#   assign=False: 1 parameters, one object True, one storage True, largest change in a step 0.100
#   assign=True: 2 parameters, one object False, one storage True, largest change in a step 0.200
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


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def step(assign):
    """Number of parameters after loading, and the largest change in one step of Adam at lr 0.1."""
    torch.manual_seed(0)
    state = Tied().state_dict()
    model = Tied()
    model.load_state_dict(state, assign=assign)
    before = model.embed.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ids = torch.arange(8)
    torch.nn.functional.cross_entropy(model(ids), ids).backward()
    optimizer.step()
    count = len(list(model.parameters()))
    change = (model.embed.weight - before).abs().max().item()
    one = model.head.weight is model.embed.weight
    shared = model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    print(f"assign={assign}: {count} parameters, one object {one}, one storage {shared}, "
          f"largest change in a step {change:.3f}")
    return count, round(change, 3)


print(f"torch {torch.__version__}")
sys.exit(0 if (step(False), step(True)) == ((1, 0.1), (2, 0.2)) else 1)
PYTHON
