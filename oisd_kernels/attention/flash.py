"""FlashAttention whose backward can hold the alignment with a later layer.

    out_i = sum_j P_ij v_j,   P = softmax_j(cap(scale * <q_i, k_j>)),   lse_i = its logsumexp

A learned sink is one more key, with a number for its score and the value 0; lse has it too.

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
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.attention import implementation
from oisd_kernels.attention.checks import (
    check_cu_seqlens,
    check_layer,
    check_masks,
    check_sink,
    check_sinks_meet,
)
from oisd_kernels.attention.divergence import (
    DivergenceCall,
    DivergenceResult,
    detached,
    divergence_op,
    of_keys,
    weighted,
)
from oisd_kernels.attention.sink import with_sink
from oisd_kernels.attention.spec import (
    Alignment,
    Geometry,
    Layer,
    Plain,
    dense_geometry,
    geometry_of,
    pack_statistic,
    packed_geometry,
    unpack_statistic,
)
from oisd_kernels.checks import compute_dtype
from oisd_kernels.op import custom_op, keep, kept, untransformed

OP = "flash_attention"
LOSS = "AttentionAlignment.loss"


class _Left(NamedTuple):
    """What the backward of a loss leaves for that of the student's attention."""

    teacher: Layer
    statistic: Tensor
    divergence: str
    beta: float


_NUMBERS = itertools.count(1)
# By an alignment's number, between two steps of one backward. Where that backward fails before the
# second step, what was left goes with the number, which the alignment and its graph hold.
_LEFT: dict[int, _Left] = {}


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
    sink: Tensor | None = None,
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
        sink: [H], any float dtype: the score of one more key of each head with the value 0, which
            every query sees whatever the masks say (gpt-oss's learned sink); neither scaled nor
            capped. Receives gradient.
        alignment: takes this call as its student, see `AttentionAlignment`.
        impl: "torch" (blocks of scores, any device; asks the device for lengths), "triton" (on a
            GPU, or under TRITON_INTERPRET=1; K at most 256), "reference" (maps in memory, plain
            autograd), "cuda" (the backward by csrc/, see docs/csrc.md). "auto": "triton" on a GPU,
            "torch" elsewhere.

    Returns:
        out, of q's shape and dtype, and lse [B, H, T] or [H, N] over the keys and the sink, natural
        logarithm, float32 (float64 if q is). Both are differentiable, once. A query without keys
        has 0, -inf.

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
    check_sink(OP, "sink", sink, heads, [], q.device)
    chosen = implementation.choose(OP, impl, [q], softcap)
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
            scale=factor, sink=sink,
        )  # fmt: skip
        if alignment is not None:
            own = scale is None
            alignment._take(_Student(q, k, lse, None, geometry, factor, own, chosen, sink))
        return out, lse
    shape = q.shape
    if dense:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    key = None if alignment is None else alignment._key
    call = FlashCall(
        q, k, v, geometry.cu_seqlens, key, geometry.max_length, *masks, factor, chosen, sink
    )
    out, lse, handle, keys_lse = flash_attention_op(*untransformed(call))
    if alignment is not None:
        tensors = q.detach(), k.detach(), (lse if sink is None else keys_lse).detach(), handle
        batch = rows[0] if dense else None
        own = detached(sink)
        student = _Student(*tensors, geometry, factor, scale is None, chosen, own, batch)
        alignment._take(student)
    return out.view(shape), unpack_statistic(lse, rows[0], rows[1]) if dense else lse


class _Student(NamedTuple):
    """A call of `flash_attention`: packed and without graph, but as it came for "reference"."""

    q: Tensor
    k: Tensor
    lse: Tensor  # over the keys alone
    handle: Tensor | None
    geometry: Geometry
    scale: float
    own_scale: bool  # K ** -0.5
    impl: str
    sink: Tensor | None
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
        number = next(_NUMBERS)
        self._key = torch.tensor(number, device="cpu")
        weakref.finalize(self._key, _LEFT.pop, number, None).atexit = False
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
        sink_teacher: Tensor | None = None,
    ) -> Tensor:
        """`attention_divergence(..., reduction="none")` of the student's attention; once.

        The student's sink is that of its `flash_attention`.

        Args:
            q_teacher: [B, T, H, K] or [N, H, K], the student's form and H; K may differ. Receives
                no gradient.
            k_teacher: [B, T, J, K] or [N, J, K]; J and K may differ from the student's.
            token_weight: [B, T] or [N], signed; rows of weight 0 cost nothing but where they share
                a tile with others.
            lse_teacher: [B, H, T] or [H, N], as its `flash_attention` returned it, if that had the
                student's masks.
            scale_teacher: None: the student's, or K ** -0.5 of its own if the student had none.
            sink_teacher: [H], as in `attention_divergence`.

        Returns:
            token_weight * divergence in nats, mean over heads, [B, T] or [N], over the keys that
            the student's masks show.

        Raises:
            RuntimeError: before `flash_attention`, or a second time.
            ValueError: a shape, dtype, device or value is not as above, or a KL is infinite because
                of a sink that one layer alone has, see `attention_divergence`.
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
        check_sink(LOSS, "sink_teacher", sink_teacher, heads, [], device)
        check_sinks_meet(LOSS, self.divergence, student.sink, sink_teacher)
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
                sink=student.sink, sink_teacher=sink_teacher,
            )  # fmt: skip
        implementation.choose(LOSS, student.impl, [student.q, q_teacher], geometry.softcap)
        if not packed:
            q_teacher, k_teacher = q_teacher.flatten(0, 1), k_teacher.flatten(0, 1)
            weight = None if weight is None else weight.flatten()
            lse_teacher = None if lse_teacher is None else pack_statistic(lse_teacher)
        sink_teacher = detached(sink_teacher)
        lse_teacher = of_keys(lse_teacher, sink_teacher)
        call = DivergenceCall(
            student.q[None], student.k[None], q_teacher, k_teacher,
            None if weight is None else weight[None], geometry.cu_seqlens, None, student.lse[None],
            lse_teacher, geometry.max_length, geometry.causal, geometry.window, geometry.softcap,
            student.scale, factor, self.divergence, self.beta, student.impl,
            None if student.sink is None else student.sink[None], sink_teacher,
        )  # fmt: skip
        found = DivergenceResult(*divergence_op(*untransformed(call)))
        lse_teacher = found.lse_teacher if lse_teacher is None else lse_teacher
        hung = _LossCall(
            student.handle, found.loss[0], weight, self._key, q_teacher, k_teacher, lse_teacher,
            found.statistic, factor, self.divergence, self.beta, sink_teacher,
        )  # fmt: skip
        return hang_on_handle(*untransformed(hung)).view(rows)


def _inside_backward() -> bool:
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1


# The attention


class FlashCall(NamedTuple):
    """The arguments of `flash_attention_op`, and those of its backward."""

    q: Tensor  # [N, H, K]
    k: Tensor  # [N, J, K]
    v: Tensor  # [N, J, K]
    cu_seqlens: Tensor  # [B + 1] int32
    key: Tensor | None  # [] int64 on the CPU: an alignment's number
    length: int | None  # of the longest sequence, where the host knows it
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    impl: str
    sink: Tensor | None = None  # [H]
    out: Tensor | None = None  # [N, H, K]; this and the rest of the backward alone
    lse: Tensor | None = None  # [H, N], over the keys alone
    d_out: Tensor | None = None
    d_lse: Tensor | None = None
    d_handle: Tensor | None = None  # [N]: the divergence's row weights, over H


class FlashResult(NamedTuple):
    out: Tensor  # [N, H, K]
    lse: Tensor  # [H, N]
    handle: Tensor  # [N]; empty without an alignment
    keys_lse: Tensor  # [H, N], lse without the sink, and without gradient; empty where it is lse


class FlashGradient(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor  # empty where only the handle has a gradient
    dsink: Tensor  # [H]; empty without a sink


def _run(call: FlashCall) -> FlashResult:
    geometry = geometry_of(call)
    out, lse = implementation.forward(call.impl, *call[:3], geometry, call.scale, call.sink)
    handle = lse.new_zeros(0 if call.key is None else len(call.q))
    if call.sink is None:
        return FlashResult(out, lse, handle, lse.new_zeros(0, 0))
    return FlashResult(out, with_sink(lse, call.sink), handle, lse)


def _allocate(call: FlashCall) -> FlashResult:
    tokens, heads, _ = call.q.shape
    lse = call.q.new_empty((heads, tokens), dtype=compute_dtype(call.q, call.k, call.v))
    handle = lse.new_empty(0 if call.key is None else tokens)
    keys_lse = lse.new_empty((0, 0) if call.sink is None else lse.shape)
    return FlashResult(call.q.new_empty(call.q.shape), lse, handle, keys_lse)


def _save(ctx: Any, call: FlashCall, result: FlashResult) -> None:
    ctx.mark_non_differentiable(result.keys_lse)
    lse = result.lse if call.sink is None else result.keys_lse
    keep(ctx, call._replace(out=result.out, lse=lse))


def _backward(ctx: Any, upstream: FlashResult) -> dict[str, Tensor | None]:
    (call,) = kept(ctx)
    d_handle = None if call.key is None else upstream.handle
    plain = upstream.out is not None or upstream.lse is not None
    if not plain and d_handle is None:
        return {}
    call = call._replace(d_out=upstream.out, d_lse=upstream.lse, d_handle=d_handle)
    dq, dk, dv, dsink = flash_attention_backward(*call)
    return {
        "q": dq,
        "k": dk,
        "v": dv if plain else None,
        "sink": None if call.sink is None else dsink,
    }


def _gradient(call: FlashCall) -> FlashGradient:
    assert call.out is not None and call.lse is not None
    plain = alignment = None
    if call.d_out is not None or call.d_lse is not None:
        d_out = torch.zeros_like(call.out) if call.d_out is None else call.d_out
        plain = Plain(call.v, call.out, d_out, call.d_lse)
    if call.d_handle is not None:
        assert call.key is not None
        left = _LEFT.pop(int(call.key))
        alignment = Alignment(
            left.teacher, call.d_handle, left.statistic, left.divergence, left.beta
        )
    student = Layer(call.q, call.k, call.lse, call.scale, call.sink)
    dq, dk, dv, dsink = implementation.backward(
        call.impl, student, geometry_of(call), plain, alignment
    )
    dv = call.v.new_zeros(0) if dv is None else dv
    return FlashGradient(dq, dk, dv, call.lse.new_zeros(0) if dsink is None else dsink)


def _allocate_gradient(call: FlashCall) -> FlashGradient:
    empty = call.d_out is None and call.d_lse is None
    dv = call.v.new_empty((0,) if empty else call.v.shape)
    dq, dk = call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape)
    assert call.lse is not None
    dsink = call.lse.new_empty((0,) if call.sink is None else call.sink.shape)
    return FlashGradient(dq, dk, dv, dsink)


flash_attention_backward = custom_op(
    "flash_attention_backward", FlashCall, FlashGradient, _gradient, _allocate_gradient
)
flash_attention_op = custom_op(
    "flash_attention", FlashCall, FlashResult, _run, _allocate, _save, _backward
)


# The loss on its handle


class _LossCall(NamedTuple):
    """The arguments of `hang_on_handle`, and those of its backward, `leave_for_student`."""

    handle: Tensor  # [N]
    value: Tensor  # [N], weighted
    weight: Tensor | None  # [N]
    key: Tensor
    q_teacher: Tensor
    k_teacher: Tensor
    lse_teacher: Tensor
    statistic: Tensor  # [1, H, N]
    scale_teacher: float
    divergence: str
    beta: float
    sink_teacher: Tensor | None = None  # [H]
    upstream: Tensor | None = None  # [N], of the backward alone


class _Rows(NamedTuple):
    rows: Tensor  # [N]


def _hang(call: _LossCall) -> _Rows:
    """`value`, whose gradient goes to the handle."""
    return _Rows(call.value.clone())


def _leave(call: _LossCall) -> _Rows:
    """Leaves the teacher under the number `key`; returns the row weights, the handle's gradient."""
    assert call.upstream is not None
    q, k, lse = call.q_teacher, call.k_teacher, call.lse_teacher
    teacher = Layer(q, k, lse, call.scale_teacher, call.sink_teacher)
    one = call.statistic if call.divergence == "forward_kl" else call.statistic[0]
    _LEFT[int(call.key)] = _Left(teacher, one, call.divergence, call.beta)
    return _Rows(weighted(call.weight, call.upstream) / call.q_teacher.shape[1])


def _allocate_rows(call: _LossCall) -> _Rows:
    return _Rows(torch.empty_like(call.value))


def _save_loss(ctx: Any, call: _LossCall, result: _Rows) -> None:
    keep(ctx, call)


def _loss_backward(ctx: Any, upstream: _Rows) -> dict[str, Tensor]:
    (call,) = kept(ctx)
    return {"handle": leave_for_student(*call._replace(upstream=upstream.rows))}


leave_for_student = custom_op("leave_for_student", _LossCall, _Rows, _leave, _allocate_rows)
hang_on_handle = custom_op(
    "hang_on_handle", _LossCall, _Rows, _hang, _allocate_rows, _save_loss, _loss_backward
)
