"""FlashAttention whose backward can hold the alignment with a later layer.

    out_i = sum_j P_ij v_j,   P = softmax_j(cap(scale * <q_i, k_j>)),   lse_i = its logsumexp

An `AttentionAlignment` adds the gradient of `attention_divergence` to q's and k's own, from one
recomputation of P for both. A student layer runs before its teacher, so what the backward needs is
bound late, and in this way:

* `flash_attention` returns, to the alignment, a handle: zeros [N] with graph;
* `AttentionAlignment.loss` computes the divergence from detached tensors and hangs it on the
  handle;
* the backward of that loss leaves the teacher's tensors under the alignment's number and gives the
  handle each row's weight as its gradient, times every factor that the loss met on its way;
* autograd runs the student's backward after it, which sees that the handle has a gradient, and
  takes what was left.

What is bound lives in the loss's graph and in nothing else: layers that checkpointing runs again
find it under the same number, and a graph that is kept may be used twice.

Letters: B sequences, T tokens of each, N tokens of all, H query heads, J key heads, K head
dimension.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.attention.attention_pass import attention_pass, refuse_double_backward
from oisd_kernels.attention.checks import (
    check_cu_seqlens,
    check_layer,
    check_masks,
    choose,
    functions,
)
from oisd_kernels.attention.spec import (
    Alignment,
    Geometry,
    Teacher,
    dense_geometry,
    pack_statistic,
    packed_geometry,
    unpack_statistic,
)
from oisd_kernels.checks import compute_dtype

OP = "flash_attention"
LOSS = "AttentionAlignment.loss"


class _Left(NamedTuple):
    """What the backward of a loss leaves for that of the student's attention."""

    teacher: Teacher
    statistic: Tensor
    divergence: str
    beta: float


_NUMBERS = itertools.count(1)
_LEFT: dict[int, _Left] = {}  # by an alignment's number, between two steps of one backward


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alignment: "AttentionAlignment | None" = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention without a map in memory, and its logsumexp.

    Two forms: dense (B sequences of T tokens) and packed (N tokens of all sequences in a row).

    Args:
        q: [B, T, H, K] or [N, H, K], any float dtype.
        k: [B, T, J, K] or [N, J, K], of q's dtype; J divides H, head h reads key head h // (H / J).
        v: as `k`.
        cu_seqlens: packed form only, int32 or int64 [number of sequences + 1], from 0 to N, never
            falling. None: one sequence. Its values are checked on the CPU only.
        causal: query i sees keys j <= i.
        window: i - window < j <= i if causal, |i - j| < window if not; at least 1.
        softcap: c of c * tanh(scores / c), above 0, applied after the scale.
        scale: multiplies the scores. None: K ** -0.5.
        alignment: takes this call as its student, see `AttentionAlignment`.
        impl: "torch" (blocks of scores, any device; asks the device for lengths), "triton" (on a
            GPU, or under TRITON_INTERPRET=1; K at most 256), "reference" (maps in memory, plain
            autograd), "cuda" (the backward by csrc/, see docs/csrc.md). "auto": "triton" on a GPU,
            "torch" elsewhere.

    Returns:
        out, of q's shape and dtype, and lse [B, H, T] or [H, N], natural logarithm, float32
        (float64 if an input is). Both are differentiable, once. A query without keys has 0, -inf.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.
        RuntimeError: the alignment has had its loss in another forward.
    """
    checks.check_dims(OP, "q", q, {3: "[N, H, K]", 4: "[B, T, H, K]"})
    *rows, heads, width = q.shape
    letters = "N" if len(rows) == 1 else "B, T"
    check_layer(OP, q, k, "", letters, rows, heads, q.device)
    checks.check_tensor(OP, "v", v, f"[{letters}, J, K]", k.shape, device=q.device)
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(OP, name, x, "", x.shape, dtypes=(q.dtype,))
    if cu_seqlens is not None:
        check_cu_seqlens(OP, cu_seqlens, rows, q)
    check_masks(OP, causal, window, softcap)
    checks.check_positive(OP, "scale", scale, optional=True)
    chosen = choose(OP, impl, [q], softcap)
    factor = width**-0.5 if scale is None else float(scale)
    masks = causal, window, softcap
    dense = len(rows) == 2
    if dense:
        geometry = dense_geometry(q, rows[0], rows[1], *masks)
    else:
        geometry = packed_geometry(q, rows[0], cu_seqlens, *masks)
    if chosen == "reference":
        out, lse = reference.attention(
            q, k, v, cu_seqlens=cu_seqlens, causal=causal, window=window, softcap=softcap,
            scale=factor,
        )  # fmt: skip
        if alignment is not None:
            own = scale is None
            alignment._take(_Student(q, k, lse, None, geometry, factor, own, chosen))
        return out, lse
    shape = q.shape
    if dense:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    key = None if alignment is None else alignment._key
    out, lse, handle = flash_attention_op(
        q, k, v, geometry.cu_seqlens, key, geometry.max_length, *masks, factor, chosen
    )
    if alignment is not None:
        tensors = q.detach(), k.detach(), lse.detach(), handle
        batch = rows[0] if dense else None
        student = _Student(*tensors, geometry, factor, scale is None, chosen, batch)
        alignment._take(student)
    return out.view(shape), unpack_statistic(lse, rows[0], rows[1]) if dense else lse


class _Student(NamedTuple):
    """A call of `flash_attention`: packed and without graph, but as it came for "reference"."""

    q: Tensor
    k: Tensor
    lse: Tensor
    handle: Tensor | None
    geometry: Geometry
    scale: float
    own_scale: bool  # K ** -0.5
    impl: str
    batch: int | None = None  # B of the dense form


class AttentionAlignment:
    """The alignment of one layer's attention with a later layer's, for one forward.

        alignment = AttentionAlignment()
        out, lse = flash_attention(q, k, v, alignment=alignment)            # student layer
        ...                                                                 # layers between
        rows = alignment.loss(q_teacher, k_teacher, token_weight=weight)    # teacher layer
        (task_loss + rows.sum()).backward()                                 # both gradients at once

    The sum of both losses must go through one `backward`; the gradient of either alone is right
    too. Without a loss, or where nothing uses it, the attention is the plain one. Safe under
    non-reentrant gradient checkpointing: the layer that runs again is given the same object.

    divergence, beta: as of `attention_divergence`.
    """

    def __init__(self, divergence: str = "jsd", beta: float = 0.5):
        checks.check_divergence("AttentionAlignment", divergence, beta)
        self.divergence, self.beta = divergence, float(beta)
        self._key = torch.tensor(next(_NUMBERS), device="cpu")
        self._student: _Student | None = None
        self._used = False

    def _take(self, student: _Student) -> None:
        if not self._used:
            self._student = student
        elif not _inside_backward():
            raise RuntimeError(
                f"{OP}: the alignment has had its loss already; make a new AttentionAlignment for "
                f"each layer and each forward"
            )

    def loss(
        self,
        q_teacher: Tensor,
        k_teacher: Tensor,
        *,
        token_weight: Tensor | None = None,
        lse_teacher: Tensor | None = None,
        scale_teacher: float | None = None,
    ) -> Tensor:
        """`attention_divergence(..., reduction="none")` of the student's attention; once.

        Args:
            q_teacher: [B, T, H, K] or [N, H, K], the student's form and H; K may differ. Receives
                no gradient.
            k_teacher: [B, T, J, K] or [N, J, K]; J and K may differ from the student's.
            token_weight: [B, T] or [N], signed; rows of weight 0 cost nothing but where they share
                a tile with others.
            lse_teacher: [B, H, T] or [H, N], as its `flash_attention` returned it, if that had the
                student's masks.
            scale_teacher: None: the student's, or K ** -0.5 of its own if the student had none.

        Returns:
            token_weight * divergence in nats, mean over heads, [B, T] or [N], over the keys that
            the student's masks show.

        Raises:
            RuntimeError: before `flash_attention`, or a second time.
            ValueError: a shape, dtype, device or value is not as above.
        """
        student = self._student
        if student is None or self._used:
            when = "twice" if self._used else "before flash_attention(..., alignment=alignment)"
            raise RuntimeError(f"{LOSS} was called {when}; it needs one call of each, in turn")
        packed = student.batch is None and student.q.dim() == 3
        geometry = student.geometry
        rows = [student.q.shape[0]] if packed else [geometry.sequences, geometry.max_length or 0]
        heads, letters = student.q.shape[-2], "N" if packed else "B, T"
        device = student.q.device
        dims = {len(rows) + 2: f"[{letters}, H, K]"}
        checks.check_dims(LOSS, "q_teacher", q_teacher, dims)
        check_layer(LOSS, q_teacher, k_teacher, "_teacher", letters, rows, heads, device)
        if token_weight is not None:
            checks.check_tensor(
                LOSS, "token_weight", token_weight, f"[{letters}]", rows, device=device
            )
        if lse_teacher is not None:
            layout, sizes = "[H, N]" if packed else "[B, H, T]", [*rows[:-1], heads, rows[-1]]
            checks.check_tensor(LOSS, "lse_teacher", lse_teacher, layout, sizes, device=device)
        checks.check_positive(LOSS, "scale_teacher", scale_teacher, optional=True)
        if scale_teacher is not None:
            factor = float(scale_teacher)
        else:
            factor = q_teacher.shape[-1] ** -0.5 if student.own_scale else student.scale
        self._used, self._student = True, None
        q_teacher, k_teacher = q_teacher.detach(), k_teacher.detach()
        weight = None if token_weight is None else token_weight.detach()
        if student.handle is None:
            return reference.attention_divergence(
                student.q, student.k, q_teacher, k_teacher, token_weight=weight,
                cu_seqlens=geometry.cu_seqlens if packed else None, causal=geometry.causal,
                window=geometry.window, softcap=geometry.softcap, scale=student.scale,
                scale_teacher=factor, divergence=self.divergence, beta=self.beta,
            )  # fmt: skip
        choose(LOSS, student.impl, [student.q, q_teacher], geometry.softcap)
        if not packed:
            q_teacher, k_teacher = q_teacher.flatten(0, 1), k_teacher.flatten(0, 1)
            weight = None if weight is None else weight.flatten()
            lse_teacher = None if lse_teacher is None else pack_statistic(lse_teacher)
        lse_teacher = None if lse_teacher is None else lse_teacher.detach()
        value, _, found, statistic = attention_pass(
            student.q[None], student.k[None], q_teacher, k_teacher,
            None if weight is None else weight[None], geometry.cu_seqlens, None, student.lse[None],
            lse_teacher, geometry.max_length, geometry.causal, geometry.window, geometry.softcap,
            student.scale, factor, self.divergence, self.beta, student.impl,
        )  # fmt: skip
        lse_teacher = found if lse_teacher is None else lse_teacher
        return hang_on_handle(
            student.handle, value[0], weight, self._key, q_teacher, k_teacher, lse_teacher,
            statistic, factor, self.divergence, self.beta,
        ).view(rows)  # fmt: skip


def _inside_backward() -> bool:
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1


# The attention


@torch.library.custom_op("oisd_kernels::flash_attention", mutates_args=())
def flash_attention_op(
    q: Tensor,  # [N, H, K]
    k: Tensor,  # [N, J, K]
    v: Tensor,  # [N, J, K]
    cu_seqlens: Tensor,  # [B + 1] int32
    key: Tensor | None,  # [] int64 on the CPU: an alignment's number
    length: int | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, H, K], [H, N], handle [N] or nothing
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        geometry = Geometry(cu_seqlens, len(cu_seqlens) - 1, length, causal, window, softcap)
        out, lse = functions(impl).forward(q, k, v, geometry, scale)
        return out, lse, lse.new_zeros(0 if key is None else len(q))


@flash_attention_op.register_fake
def _(q, k, v, cu_seqlens, key, length, causal, window, softcap, scale, impl):
    compute = compute_dtype(q, k, v)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=compute)
    return q.new_empty(q.shape), lse, lse.new_empty(0 if key is None else q.shape[0])


@torch.library.custom_op("oisd_kernels::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_handle: Tensor | None,  # [N]: the divergence's row weights, over H
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    key: Tensor | None,
    out: Tensor,
    lse: Tensor,
    length: int | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # dv is empty where only the handle has a gradient
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        geometry = Geometry(cu_seqlens, len(cu_seqlens) - 1, length, causal, window, softcap)
        plain: dict[str, Tensor | None] = {}
        if d_out is not None or d_lse is not None:
            d_out = torch.zeros_like(out) if d_out is None else d_out
            plain = {"v": v, "out": out, "d_out": _unit_stride(d_out), "d_lse": d_lse}
        alignment = None
        if d_handle is not None:
            assert key is not None
            left = _LEFT.pop(int(key))
            alignment = Alignment(
                left.teacher, d_handle, left.statistic, left.divergence, left.beta
            )
        dq, dk, dv = functions(impl).backward(
            q, k, geometry, scale, lse, **plain, alignment=alignment
        )
        return dq, dk, v.new_zeros(0) if dv is None else dv


@flash_attention_backward.register_fake
def _(d_out, d_lse, d_handle, q, k, v, *_):
    empty = d_out is None and d_lse is None
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty((0,) if empty else v.shape)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    out, lse, _ = output
    ctx.save_for_backward(*inputs[:5], out, lse)
    ctx.options = inputs[5:]


def _attention_backward(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, d_handle: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    nothing = [None] * (2 + len(ctx.options))
    tensors = ctx.saved_tensors
    if tensors[4] is None:  # without an alignment the handle is empty
        d_handle = None
    if d_out is None and d_lse is None and d_handle is None:
        return None, None, None, *nothing
    dq, dk, dv = flash_attention_backward(d_out, d_lse, d_handle, *tensors, *ctx.options)
    return dq, dk, None if d_out is None and d_lse is None else dv, *nothing


flash_attention_op.register_autograd(_attention_backward, setup_context=_setup_attention)


# The loss on its handle


@torch.library.custom_op("oisd_kernels::hang_on_handle", mutates_args=())
def hang_on_handle(
    handle: Tensor,  # [N]
    value: Tensor,  # [N], weighted
    weight: Tensor | None,  # [N]
    key: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    lse_teacher: Tensor,
    statistic: Tensor,  # [1, H, N]
    scale_teacher: float,
    divergence: str,
    beta: float,
) -> Tensor:
    """`value`, whose gradient goes to the handle."""
    return value.clone()


@hang_on_handle.register_fake
def _(handle, value, *_):
    return torch.empty_like(value)


@torch.library.custom_op("oisd_kernels::leave_for_student", mutates_args=())
def leave_for_student(
    upstream: Tensor,  # [N]
    weight: Tensor | None,
    key: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    lse_teacher: Tensor,
    statistic: Tensor,
    scale_teacher: float,
    divergence: str,
    beta: float,
) -> Tensor:
    """Leaves the teacher under the number `key`; returns the row weights, the handle's gradient."""
    teacher = Teacher(q_teacher, k_teacher, lse_teacher, scale_teacher)
    one = statistic if divergence == "forward_kl" else statistic[0]
    _LEFT[int(key)] = _Left(teacher, one, divergence, beta)
    heads = q_teacher.shape[1]
    if weight is None:
        return upstream / heads
    return torch.where(weight == 0, 0, upstream * weight.to(upstream.dtype)) / heads


@leave_for_student.register_fake
def _(upstream, *_):
    return torch.empty_like(upstream)


def _setup_hanging(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[2:8])
    ctx.options = inputs[8:]


def _hanging_backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    nothing = [None] * 10
    if upstream is None:
        return None, *nothing
    return leave_for_student(upstream, *ctx.saved_tensors, *ctx.options), *nothing


hang_on_handle.register_autograd(_hanging_backward, setup_context=_setup_hanging)
