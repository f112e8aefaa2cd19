#!/usr/bin/env bash
# `DTensor.full_tensor()` keeps each rank's own gradient and drops the other ranks'.
#
# Each rank gathers the whole weight, uses it with data of its own and calls backward(). One would
# expect the gradient of a shard to be the sum over ranks, as a gather's backward is a
# reduce-scatter. The bare call takes the gradients for copies of one another, and each rank keeps
# its slice of its own. With different data per rank, as under FSDP2, the shards then follow
# different losses. `grad_placements` says what is wanted.
#
# Seen with torch 2.13.0 (CPU, gloo), Python 3.11: inputs of 1 on rank 0 and 10 on rank 1, and the
# gradient of the half of the weight that each rank holds
#   full_tensor()                 (1.0, 10.0)
#   grad_placements=Partial(sum)  (11.0, 11.0)
#   grad_placements=Partial(avg)  (5.5, 5.5)
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
from torch.distributed.tensor import Partial, Shard, distribute_tensor


def gradients(rank, ranks, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    found = []
    for placements in (None, [Partial("sum")], [Partial("avg")]):
        weight = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).requires_grad_()
        data = torch.full((4,), 10.0**rank)  # 1 on rank 0, 10 on rank 1
        (weight.full_tensor(grad_placements=placements) * data).sum().backward()
        found.append(weight.grad.to_local()[0].item())
    results[rank] = found
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(gradients, (2, os.path.join(folder, "store"), results), 2)
        bare, added, averaged = zip(results[0], results[1], strict=True)
    print(f"torch {torch.__version__}: gradient of the half that rank 0 and rank 1 hold")
    print(f"full_tensor()                 {bare}")
    print(f"grad_placements=Partial(sum)  {added}")
    print(f"grad_placements=Partial(avg)  {averaged}")
    same = bare == (1, 10) and added == (11, 11) and averaged == (5.5, 5.5)
    sys.exit(0 if same else 1)
PYTHON
"$folder/venv/bin/python" ranks.py
