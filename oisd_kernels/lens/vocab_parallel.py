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

A teacher with a head of its own has it in the same parts, over the same ranks.

Letters: V vocabulary, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TENSOR_PARALLEL = "tp"  # the name of a mesh dimension


class Part(NamedTuple):
    """What this rank has of the unembedding; the whole where `group` is ""."""

    weight: Tensor  # [rows, D]
    bias: Tensor | None  # [rows]
    group: str  # the process group's name
    start: int  # first row, of V
    vocabulary: int  # V
    rows: tuple[int, ...]  # of each rank's part

    @property
    def largest(self) -> int:
        """Rows of the largest part, from which all ranks take the size of their chunks."""
        return max(self.rows)

    def detach(self) -> Part:
        """The same, to which no gradient flows."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weight=self.weight.detach(), bias=bias)

    def check_impl(self, op: str, impl: str) -> None:
        if self.group and impl not in ("auto", "chunked"):
            wanted = 'be "auto" or "chunked" where the vocabulary is in parts'
            raise checks.argument_error(op, "impl", wanted, repr(impl))


def part(
    op: str,
    hidden: Tensor,  # [..., N, D]
    weight: Any,
    bias: Any,
    tp_group: ProcessGroup | None,
    weight_grad: bool,
    prefix: str = "",
) -> Part:
    """The checked unembedding of an op on this rank.

    With `tp_group` and plain tensors the ranks tell one another their sizes: one small collective,
    for which the host waits.

    weight_grad: whether `weight` and `bias` receive gradient where they require it.
    prefix: "teacher_" where these are the op's `teacher_hidden`, `teacher_weight`, `teacher_bias`.

    Raises ValueError where `weight` or `bias` is none of the forms above.
    """
    if checks.is_dtensor(weight) or checks.is_dtensor(bias):
        return _from_dtensor(op, hidden, weight, bias, tp_group, weight_grad, prefix)
    if tp_group is None:
        checks.check_head(op, hidden, weight, bias, prefix=prefix)
        return whole(weight, bias)
    checks.check_head(op, hidden, weight, bias, empty=True, prefix=prefix)
    rank, size = _place(op, tp_group)
    if size == 1:
        checks.check_head(op, hidden, weight, bias, prefix=prefix)
        return whole(weight, bias)
    parts, tokens = _sizes(hidden, weight, tp_group, rank, size)
    if len(set(tokens)) > 1:
        wanted = "have as many rows on every rank of tp_group"
        remedy = "the group shares the vocabulary, not the tokens: gather what is split"
        raise checks.argument_error(op, f"{prefix}hidden", wanted, tokens, remedy)
    return _part(op, weight, bias, tp_group, parts, rank, prefix)


def two_parts(
    op: str,
    hidden: Tensor,  # [N, D]
    weight: Any,
    bias: Any,
    teacher_hidden: Tensor,  # [N, E]
    teacher_weight: Any,
    teacher_bias: Any,
    tp_group: ProcessGroup | None,
) -> tuple[Part, Part]:
    """The checked unembeddings of a student and a teacher: both whole, or both in the same parts.

    Where the two are one, so are their parts. The student's receives gradient.

    Raises ValueError on every rank, for what `part` does and where the parts differ.
    """
    student = part(op, hidden, weight, bias, tp_group, True)
    if teacher_weight is weight and teacher_bias is bias:
        bias = student.bias
        checks.check_head(op, teacher_hidden, student.weight, bias, empty=True, prefix="teacher_")
        return student, student
    if not student.group:
        checks.check_dims(op, "teacher_weight", teacher_weight, {2: "[V, E]"})
        if len(teacher_weight) != student.vocabulary:
            wanted, got = f"have {student.vocabulary} rows, as weight", list(teacher_weight.shape)
            remedy = "student and teacher must share the vocabulary"
            raise checks.argument_error(op, "teacher_weight", wanted, got, remedy)
    teacher = part(op, teacher_hidden, teacher_weight, teacher_bias, tp_group, False, "teacher_")
    if not student.group and not teacher.group:
        return student, teacher
    if not student.group:
        wanted, got = "be whole, as weight is", f"parts of {list(teacher.rows)} rows"
        remedy = "distribute both alike, over the ranks of one group"
        raise checks.argument_error(op, "teacher_weight", wanted, got, remedy)
    wanted = f"be in the parts of weight, {list(student.rows)} rows on the ranks of its group"
    if not teacher.group:
        rows = f"{student.start}:{student.start + len(student.weight)}"
        got = f"all {teacher.vocabulary} rows on this rank"
        remedy = f"distribute it as weight is; or as plain tensors its rows {rows}, with tp_group"
    elif teacher.rows != student.rows:
        got = list(teacher.rows)
        remedy = "give each rank the same tokens of both vocabularies"
    elif (theirs := _ranks(teacher.group)) != (ours := _ranks(student.group)):
        got = f"parts on ranks {theirs}, not {ours}"
        remedy = "distribute both over the ranks of one group"
    else:
        return student, teacher
    raise checks.argument_error(op, "teacher_weight", wanted, got, remedy)


def whole(weight: Tensor, bias: Tensor | None) -> Part:
    return Part(weight, bias, "", 0, len(weight), (len(weight),))


def _part(
    op: str,
    weight: Tensor,
    bias: Tensor | None,
    group: ProcessGroup,
    sizes: list[int],
    rank: int,
    prefix: str,
) -> Part:
    if not sum(sizes):
        wanted = "have at least one row on some rank"
        raise checks.argument_error(op, f"{prefix}weight", wanted, sizes)
    name, start = group.group_name, sum(sizes[:rank])
    return Part(weight, bias, name, start, sum(sizes), tuple(sizes))


def _ranks(name: Any) -> list[int]:
    """The processes of a group, in its order."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import _resolve_process_group

    return dist.get_process_group_ranks(_resolve_process_group(name))


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
    prefix: str,
) -> Part:
    weight_name, bias_name = f"{prefix}weight", f"{prefix}bias"
    if bias is not None and checks.is_dtensor(weight) != checks.is_dtensor(bias):
        wanted, remedy = f"be a DTensor, as {weight_name} is", f"distribute it as {weight_name} is"
        if checks.is_dtensor(bias):
            wanted = f"be a plain tensor, as {weight_name} is"
            remedy = f"pass {bias_name}.full_tensor()"
        raise checks.argument_error(op, bias_name, wanted, f"a {type(bias).__name__}", remedy)
    dimension = _sharded_dimension(op, weight_name, weight, tp_group, weight_grad)
    if bias is not None:
        along = _sharded_dimension(op, bias_name, bias, tp_group, weight_grad)
        if along != dimension or bias.device_mesh != weight.device_mesh:
            got = f"{bias.placements} beside {weight.placements} of {weight_name}"
            raise checks.argument_error(op, bias_name, f"be placed as {weight_name} is", got)
    local, local_bias = weight.to_local(), None if bias is None else bias.to_local()
    if dimension is None:
        if tp_group is not None:
            remedy = "leave tp_group out: every rank has the whole"
            raise checks.argument_error(
                op, weight_name, "be sharded over tp_group", f"{weight.placements}", remedy
            )
        checks.check_head(op, hidden, local, local_bias, prefix=prefix)
        return whole(local, local_bias)
    checks.check_head(op, hidden, local, local_bias, empty=True, prefix=prefix)
    mesh = weight.device_mesh
    rank, size = mesh.get_local_rank(dimension), mesh.size(dimension)
    # Shard(0) splits as torch.chunk does: the last parts may be shorter, or empty.
    step = -(-len(weight) // size)
    sizes = [min(step, max(len(weight) - step * r, 0)) for r in range(size)]
    if sizes[rank] != len(local):
        wanted = f"have {sizes[rank]} of its {len(weight)} rows on rank {rank} of {size}"
        raise checks.argument_error(op, weight_name, wanted, len(local), "distribute it evenly")
    if size == 1:
        return whole(local, local_bias)
    return _part(op, local, local_bias, mesh.get_group(dimension), sizes, rank, prefix)


def _sharded_dimension(
    op: str, argument: str, x: Any, tp_group: ProcessGroup | None, gradient: bool
) -> int | None:
    """The dimension of the mesh over which the vocabulary is in parts, None for none."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, found = x.device_mesh, []
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    to_gather = checks.how_to_gather(argument, x)
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
