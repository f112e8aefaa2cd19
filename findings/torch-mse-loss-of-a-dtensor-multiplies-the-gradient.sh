#!/usr/bin/env bash
# The gradient of `F.mse_loss` of a sharded DTensor is too large by the number of ranks.
#
# The loss is right, and so are loss and gradient of `x.square().mean()` and of `l1_loss`. In
# `mse_loss` and `huber_loss` each rank divides by the number of its own entries, and nothing
# divides by the number of ranks: on four ranks the gradient is four times too large. With rows that
# do not divide by the ranks the loss is wrong too, because the ranks' means are averaged as if the
# shards were of one size: of three rows on two ranks, the last counts twice. (That was so in
# `mean()`, too: pytorch/pytorch#162692.) `reduction="sum"`, divided by hand, is right.
#
# Seen with torch 2.13.0 (CPU, gloo), Python 3.11: loss over that of a plain tensor, and gradient
#                        4 rows, 2 ranks   4 rows, 4 ranks   3 rows, 2 ranks
#   x.square().mean()    1.000  1.000      1.000  1.000      1.000  1.000
#   l1_loss              1.000  1.000      1.000  1.000      1.000  1.000
#   mse_loss             1.000  2.000      1.000  4.000      1.409  2.860
#   huber_loss           1.000  2.000      1.000  4.000      1.300  2.121
#   mse_loss, a sum      1.000  1.000      1.000  1.000      1.000  1.000
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > ranks.py <<'PYTHON'
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

LOSSES = {
    "x.square().mean()": lambda x: x.square().mean(),
    "l1_loss": lambda x: F.l1_loss(x, torch.zeros_like(x)),
    "mse_loss": lambda x: F.mse_loss(x, torch.zeros_like(x)),
    "huber_loss": lambda x: F.huber_loss(x, torch.zeros_like(x)),
    "mse_loss, a sum": lambda x: F.mse_loss(x, torch.zeros_like(x), reduction="sum") / x.numel(),
}
CASES = {(4, 2): [1.0, 2.0, 6.0, 3.0], (4, 4): [1.0, 2.0, 6.0, 3.0], (3, 2): [1.0, 2.0, 6.0]}


def losses(rank, ranks, store, rows, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    for name, loss in LOSSES.items():
        x = distribute_tensor(torch.tensor(rows), mesh, [Shard(0)]).requires_grad_()
        plain = torch.tensor(rows, requires_grad=True)
        value, wanted = loss(x), loss(plain)
        value.backward()
        wanted.backward()
        gradient = x.grad.full_tensor().norm() / plain.grad.norm()
        ratios = (value.full_tensor() / wanted).item(), gradient.item()
        if rank == 0:
            results[name, len(rows), ranks] = ratios
    dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager:
        results = manager.dict()
        for (_, ranks), rows in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(losses, (ranks, os.path.join(folder, "store"), rows, results), ranks)
        results = dict(results)
    print(f"torch {torch.__version__}")
    print(" " * 20, *(f"{rows} rows, {ranks} ranks" for rows, ranks in CASES), sep="   ")
    for name in LOSSES:
        shown = ["{:.3f}  {:.3f}   ".format(*results[name, *case]) for case in CASES]
        print(f"{name:20}", *shown, sep="   ")
    wanted = {
        (name, rows, ranks): (1.0, 1.0 if name not in ("mse_loss", "huber_loss") else float(ranks))
        for name in LOSSES for rows, ranks in CASES
    }
    wanted["mse_loss", 3, 2], wanted["huber_loss", 3, 2] = (1.409, 2.860), (1.300, 2.121)
    same = all(
        abs(found - w) < 1e-3
        for case, pair in wanted.items()
        for found, w in zip(results[case], pair, strict=True)
    )
    sys.exit(0 if same else 1)
PYTHON
"$folder/venv/bin/python" ranks.py
