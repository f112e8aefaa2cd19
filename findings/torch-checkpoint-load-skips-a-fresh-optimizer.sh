#!/usr/bin/env bash
# torch.distributed.checkpoint leaves out the moments of an optimizer that has not stepped yet.
#
# `dcp.load` fills the entries that the given state dict has. The state dict of a new AdamW holds
# its settings but no moments, which are made in the first step. So a run that resumes gets the
# weights, the step and the learning rate, starts with moments of zero, and hears nothing of it.
# `get_optimizer_state_dict` of torch.distributed.checkpoint.state_dict makes the moments first.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   saved: moments of 2 parameters
#   loaded: weights True, step 3, lr 0.01, moments of 0 parameters
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import tempfile

import torch
import torch.distributed.checkpoint as dcp

torch.set_num_threads(1)


def fresh(lr):
    model = torch.nn.Linear(4, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


model, optimizer = fresh(0.01)
for _ in range(3):
    model(torch.ones(2, 4)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
with tempfile.TemporaryDirectory() as folder:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=folder)
    again, resumed = fresh(5.0)
    state = {"model": again.state_dict(), "optimizer": resumed.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=folder)
resumed.load_state_dict(state["optimizer"])
weights = torch.equal(model.weight, again.weight)
rate = resumed.param_groups[0]["lr"]
print(f"torch {torch.__version__}")
print(f"saved: moments of {len(optimizer.state)} parameters")
print(f"loaded: weights {weights}, step {state['step']}, lr {rate}, "
      f"moments of {len(resumed.state)} parameters")
same = weights and state["step"] == 3 and rate == 0.01 and len(resumed.state) == 0
sys.exit(0 if same else 1)
PYTHON
