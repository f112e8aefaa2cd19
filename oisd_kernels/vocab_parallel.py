"""The unembedding in parts: rows of `weight` [V, D] on the ranks of a tensor-parallel group.

Every rank calls the op with the same rows and options and with its own part of `weight` and `bias`.
All get the same values and the whole gradient to hidden states, summed over the ranks (so they must
not be summed again, as Megatron's copy to the tensor-parallel region would); the gradient to
`weight` and `bias` is that of the part. Beside a few numbers a row (`rows_parallel`), the gradient
of a chunk's rows to hidden states is all that travels, in float32.

A part is told by `tp_group`, for plain tensors, or by a DTensor:

    tp_group=group                          the ranks' parts in the group's order, of any lengths
    DTensor, Shard(0) on dimension "tp"     its name in the mesh is the convention of PyTorch's own
    DTensor, Shard(0), tp_group=group       another name: the group of the mesh dimension
    DTensor, Replicate()                    the whole on every rank

Any other sharding, FSDP2's among them, means that the caller should gather it, and is refused.

Letters: V vocabulary, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from oisd_kernels import checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Result = TypeVar("_Result")

TENSOR_PARALLEL = "tp"  # the name of a mesh dimension


class Part(NamedTuple):
    """What this rank has of the unembedding; the whole where `group` is ""."""

    weight: Tensor  # [rows, D]
    bias: Tensor | None  # [rows]
    group: str  # the process group's name
    start: int  # first row, of V
    vocabulary: int  # V
    largest: int  # rows of the largest part, from which all ranks take the size of their chunks


def part(
    op: str,
    hidden: Tensor,  # [..., N, D]
    weight: Any,
    bias: Any,
    tp_group: ProcessGroup | None,
    weight_grad: bool,
) -> Part:
    """The checked unembedding of an op on this rank.

    With `tp_group` and plain tensors the ranks tell one another their sizes: one small collective,
    for which the host waits.

    weight_grad: whether `weight` and `bias` receive gradient where they require it.

    Raises ValueError where `weight` or `bias` is none of the forms above.
    """
    if checks.is_dtensor(weight) or checks.is_dtensor(bias):
        return _from_dtensor(op, hidden, weight, bias, tp_group, weight_grad)
    if tp_group is None:
        checks.check_head(op, hidden, weight, bias)
        return whole(weight, bias)
    checks.check_head(op, hidden, weight, bias, empty=True)
    rank, size = _place(op, tp_group)
    if size == 1:
        checks.check_head(op, hidden, weight, bias)
        return whole(weight, bias)
    parts, tokens = _sizes(hidden, weight, tp_group, rank, size)
    if len(set(tokens)) > 1:
        wanted = "have as many rows on every rank of tp_group"
        remedy = "the group shares the vocabulary, not the tokens: gather what is split"
        raise checks.argument_error(op, "hidden", wanted, tokens, remedy)
    return _part(op, weight, bias, tp_group, parts, rank)


def bind(op: str, impl: str, run: Callable[..., _Result], part: Part) -> Callable[..., _Result]:
    """`run`, the implementation behind `impl`, for this part of the unembedding."""
    if not part.group:
        return run
    if impl not in ("auto", "chunked"):
        wanted = 'be "auto" or "chunked" where the vocabulary is in parts'
        raise checks.argument_error(op, "impl", wanted, repr(impl))
    return functools.partial(run, part=part)


def whole(weight: Tensor, bias: Tensor | None) -> Part:
    return Part(weight, bias, "", 0, len(weight), len(weight))


def _part(
    op: str,
    weight: Tensor,
    bias: Tensor | None,
    group: ProcessGroup,
    sizes: list[int],
    rank: int,
) -> Part:
    if not sum(sizes):
        raise checks.argument_error(op, "weight", "have at least one row on some rank", sizes)
    name, start = group.group_name, sum(sizes[:rank])
    return Part(weight, bias, name, start, sum(sizes), max(sizes))


def _place(op: str, group: ProcessGroup) -> tuple[int, int]:
    """Rank within the group, and its size."""
    if not hasattr(group, "group_name"):
        wanted = "be a torch.distributed.ProcessGroup"
        raise checks.argument_error(op, "tp_group", wanted, type(group).__name__)
    import torch.distributed as dist

    rank = dist.get_rank(group)
    if rank < 0:
        raise checks.argument_error(
            op, "tp_group", "contain this process", f"rank {dist.get_rank()} outside of it"
        )
    return rank, dist.get_world_size(group)


def _sizes(
    hidden: Tensor, weight: Tensor, group: ProcessGroup, rank: int, size: int
) -> tuple[list[int], list[int]]:
    """Rows of `weight` and of `hidden` on each rank."""
    import torch.distributed as dist

    every = torch.zeros(size, 2, dtype=torch.int64, device=hidden.device)
    every[rank, 0], every[rank, 1] = len(weight), hidden.shape[:-1].numel()
    dist.all_reduce(every, dist.ReduceOp.SUM, group)
    parts, tokens = every.t().tolist()
    return parts, tokens


def _from_dtensor(
    op: str,
    hidden: Tensor,
    weight: Any,
    bias: Any,
    tp_group: ProcessGroup | None,
    weight_grad: bool,
) -> Part:
    if bias is not None and checks.is_dtensor(weight) != checks.is_dtensor(bias):
        wanted, remedy = "be a DTensor, as weight is", "distribute it as weight is"
        if checks.is_dtensor(bias):
            wanted, remedy = "be a plain tensor, as weight is", "pass bias.full_tensor()"
        raise checks.argument_error(op, "bias", wanted, f"a {type(bias).__name__}", remedy)
    dimension = _sharded_dimension(op, "weight", weight, tp_group, weight_grad)
    if bias is not None:
        along = _sharded_dimension(op, "bias", bias, tp_group, weight_grad)
        if along != dimension or bias.device_mesh != weight.device_mesh:
            got = f"{bias.placements} beside {weight.placements} of weight"
            raise checks.argument_error(op, "bias", "be placed as weight is", got)
    local, local_bias = weight.to_local(), None if bias is None else bias.to_local()
    if dimension is None:
        if tp_group is not None:
            remedy = "leave tp_group out: every rank has the whole"
            raise checks.argument_error(
                op, "weight", "be sharded over tp_group", f"{weight.placements}", remedy
            )
        checks.check_head(op, hidden, local, local_bias)
        return whole(local, local_bias)
    checks.check_head(op, hidden, local, local_bias, empty=True)
    mesh = weight.device_mesh
    rank, size = mesh.get_local_rank(dimension), mesh.size(dimension)
    # Shard(0) splits as torch.chunk does: the last parts may be shorter, or empty.
    step = -(-len(weight) // size)
    sizes = [min(step, max(len(weight) - step * r, 0)) for r in range(size)]
    if sizes[rank] != len(local):
        wanted = f"have {sizes[rank]} of its {len(weight)} rows on rank {rank} of {size}"
        raise checks.argument_error(op, "weight", wanted, len(local), "distribute it evenly")
    if size == 1:
        return whole(local, local_bias)
    return _part(op, local, local_bias, mesh.get_group(dimension), sizes, rank)


def _sharded_dimension(
    op: str, argument: str, x: Any, tp_group: ProcessGroup | None, gradient: bool
) -> int | None:
    """The dimension of the mesh over which the vocabulary is in parts, None for none."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, found = x.device_mesh, []
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    to_gather = f"pass {argument}.full_tensor(), or {checks.GATHER}"
    for dimension, (name, placement) in enumerate(zip(names, x.placements, strict=True)):
        tensor_parallel = name == TENSOR_PARALLEL
        if tp_group is not None:
            tensor_parallel = mesh.get_group(dimension).group_name == tp_group.group_name
        if type(placement) is Shard and placement.dim == 0 and tensor_parallel:
            found.append(dimension)
        elif type(placement) is not Replicate:
            got = f"a DTensor of {placement} over {name or f'dimension {dimension}'}"
            remedy = (
                f'{to_gather}; a vocabulary in parts needs a mesh dimension named "tp" or tp_group'
            )
            wanted = "be a plain tensor or tensor-parallel"
            raise checks.argument_error(op, argument, wanted, got, remedy)
        elif mesh.size(dimension) == 1 or tensor_parallel:
            continue
        elif gradient and x.requires_grad and torch.is_grad_enabled():
            # Where the ranks have tokens of their own its gradient is a sum over them, which
            # `to_local` cannot know.
            got = f"a DTensor replicated over {name or f'dimension {dimension}'}"
            remedy = (
                f"pass {argument}.to_local(grad_placements=...): Partial() over a dimension whose "
                f"ranks have other tokens, Replicate() where they have the same"
            )
            wanted = "say how its gradient is placed"
            raise checks.argument_error(op, argument, wanted, got, remedy)
    return found[0] if found else None
