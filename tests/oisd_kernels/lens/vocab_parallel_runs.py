"""Calls of the ops with the vocabulary in parts: one process of a gloo group, or none.

python tests/vocab_parallel_runs.py FOLDER SIZE...
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from oisd_kernels import (
    PolicyTerms,
    distillation_divergence,
    linear_logprob,
    logit_lens_divergence,
    policy_head,
)
from oisd_kernels.drop_in import chunked_divergence_loss
from oisd_kernels.lens.logit_lens import LensTop, lens_with_top
from tests import ROOT


@dataclass
class Call:
    """One call of an op, with the whole unembedding."""

    op: str
    tensors: dict[str, Tensor]
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    upstream: dict[str, Tensor] = field(default_factory=dict)  # by the output's name
    wanted: tuple[str, ...] = ()  # tensors whose gradient is asked for; "weight" means bias too
    split: Any = None  # rows of each rank; or how the weight is a DTensor
    fewer_rows: bool = False  # a token less on the last rank, which is an error
    teacher_split: Any = None  # of `teacher_weight` where there is one; None for `split`
    own_rows: bool = False  # each rank has other tokens


def trl_loss(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The drop-in, which takes no group."""
    assert options.pop("tp_group", None) is None
    biases = {
        f"{who}_lm_head_bias": options.pop(name)
        for who, name in (("student", "bias"), ("teacher", "teacher_bias"))
    }
    mask, beta = options.pop("token_weight"), options.pop("beta")
    heads = weight, teacher_weight
    return chunked_divergence_loss(student, teacher, *heads, mask, beta, **biases, **options)


def likeliest(*inputs: Tensor, tp_group: Any = None, **options: Any) -> LensTop:
    assert tp_group is None, "of a DTensor alone"
    return lens_with_top(*inputs, **options)[1]


OPS = {
    "likeliest": likeliest,
    "chunked_divergence_loss": trl_loss,
    "distillation_divergence": distillation_divergence,
    "logit_lens_divergence": logit_lens_divergence,
    "linear_logprob": linear_logprob,
    "policy_head": policy_head,
}
TWO_HEADS = {
    name: ("hidden", "weight", "teacher_hidden", "teacher_weight")
    for name in ("chunked_divergence_loss", "distillation_divergence")
}
ORDER = TWO_HEADS | {
    "likeliest": ("hidden", "teacher_hidden", "weight"),
    "logit_lens_divergence": ("hidden", "teacher_hidden", "weight"),
    "linear_logprob": ("hidden", "weight", "labels"),
    "policy_head": ("hidden_final", "weight", "labels", "student_hidden"),
}


def run(call: Call, rank: int | None = None, **options: Any) -> dict[str, Tensor]:
    """The values and gradients of a call; of this rank's part where there is a rank."""
    tensors = dict(call.tensors)
    weight, bias, more = call.weight, call.bias, dict(call.options)
    one_head = call.op in TWO_HEADS and "teacher_weight" not in tensors
    teacher = tensors.pop("teacher_weight", None), tensors.pop("teacher_bias", None)
    if call.fewer_rows and rank == dist.get_world_size() - 1:
        tensors = {name: x[:-1] for name, x in tensors.items()}
    if rank is not None:
        if call.own_rows:
            tensors = {name: x[rank :: dist.get_world_size()] for name, x in tensors.items()}
        *teacher, _ = _part(*teacher, call.teacher_split or call.split, rank)
        weight, bias, more["tp_group"] = _part(weight, bias, call.split, rank)
    for name in tensors.keys() & call.wanted:
        tensors[name] = tensors[name].clone().requires_grad_()
    if "weight" in call.wanted:
        weight = weight.detach().clone().requires_grad_()
        bias = None if bias is None else bias.detach().clone().requires_grad_()
    tensors["weight"] = weight
    if call.op in TWO_HEADS:
        tensors["teacher_weight"], more["teacher_bias"] = (weight, bias) if one_head else teacher
    if "policy" in more:
        more["policy"] = PolicyTerms(**more["policy"])
    if call.op == "logit_lens_divergence":
        more["return_stats"] = True
    if call.op == "distillation_divergence":
        more["return_entropy"] = True
    positional = [tensors.pop(name) for name in ORDER[call.op] if name in tensors]
    leaves = dict(zip(ORDER[call.op], positional, strict=False))
    out = OPS[call.op](*positional, bias=bias, **tensors, **(more | options))
    if call.op in TWO_HEADS:
        values = dict(zip(("loss", "entropy"), out[:2], strict=True))
    elif call.op == "logit_lens_divergence":
        loss, stats = out
        values = {"loss": loss, **stats._asdict()}
    else:
        values = out._asdict()
        stats = values.pop("stats")._asdict() if "stats" in values else {}
        values |= {f"stats_{name}": x for name, x in stats.items()}
    total = sum(((values[name] * g).sum() for name, g in call.upstream.items()), torch.zeros(()))
    if call.wanted:
        total.backward()
    for name, x in leaves.items():
        assert not x.requires_grad or x.grad is not None, (name, call.op, call.split, call.options)
    if one_head:
        del leaves["teacher_weight"]  # it is "weight"
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if x.requires_grad}
    if "weight" in call.wanted and bias is not None:
        gradients["d_bias"] = bias.grad
    return {name: _plain(x) for name, x in (values | gradients).items()}


def _plain(x: Tensor) -> Tensor:
    if isinstance(x, DTensor):
        assert x.placements[-1] in (Shard(0), Replicate())
        x = x.to_local()
    return x.detach().clone()


@functools.cache  # each makes process groups
def _mesh(kind: str, world: int) -> DeviceMesh:
    if kind == "tp-of-two-dimensions":
        return init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    name = {"dtensor": "tp", "replicated": "dp", "group": "vocabulary", "fsdp": "fsdp"}[kind]
    return init_device_mesh("cpu", (world,), mesh_dim_names=(name,))


def _part(
    weight: Tensor | None, bias: Tensor | None, split: Any, rank: int
) -> tuple[Tensor | None, Tensor | None, Any]:
    """This rank's rows, and the group to name."""
    both, world = (weight, bias), dist.get_world_size()
    if split == "whole":
        return weight, bias, None
    if isinstance(split, list):
        weight, bias = (None if x is None else x.split(split)[rank] for x in both)
        return weight, bias, dist.group.WORLD
    mesh = _mesh(split, world)
    placements: list[Any] = [Replicate() if split == "replicated" else Shard(0)]
    if mesh.ndim == 2:
        placements = [Replicate(), Shard(0)]
    weight, bias = (None if x is None else distribute_tensor(x, mesh, placements) for x in both)
    return weight, bias, mesh.get_group(0) if split == "group" else None


def member(rank: int, size: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    done: list[Any] = []
    for call in torch.load(folder / "calls.pt", weights_only=False):
        try:
            done.append(run(call, rank))
        except ValueError as error:
            done.append(str(error))
    torch.save(done, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_processes(
    folder: Path, calls: dict[int, list[Call]]
) -> dict[int, list[tuple[dict[str, Tensor] | str, ...]]]:
    """What each call gave on each rank, by the number of processes; an error as its message."""
    for size, some in calls.items():
        (folder / str(size)).mkdir()
        torch.save(some, folder / str(size) / "calls.pt")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.oisd_kernels.lens.vocab_parallel_runs",
            str(folder),
            *map(str, calls),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        size: list(zip(*(torch.load(folder / f"{size}/{r}.pt") for r in range(size)), strict=True))
        for size in calls
    }


def main(folder: str, *sizes: str) -> None:
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for size in map(int, sizes):
        arguments = [(rank, size, Path(folder, str(size))) for rank in range(size)]
        members = [fork.Process(target=member, args=each) for each in arguments]
        for process in members:
            process.start()
        for process in members:
            process.join()
        if any(process.exitcode for process in members):
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
