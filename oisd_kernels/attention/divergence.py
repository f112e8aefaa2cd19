"""Divergence between the attention maps of a student layer and of the final layer.

    s_ij = cap(scale * <q_i, k_j>)   over the keys j that query i sees
    q = softmax_j(s) of the student, p = softmax_j(s) of the teacher (detached), per query head
    with a sink, over one more key, whose score is the number sink_h: `oisd_kernels.attention.sink`
    loss_i = token_weight_i * mean over heads of divergence(p, q)

cap(s) = c * tanh(s / c) where softcap = c is given, else s. Head h of one layer meets head h of the
other; within a layer it reads key head h // (H / J). The divergences are those of
`oisd_kernels.reference`; jsd with beta = 1/2 is eq. 8 to 10 of arXiv 2605.29089.

The forward of the op finds both logsumexps (of the keys, without a sink) where they are not given,
then the divergence and each row's statistic; the backward is one more pass over the scores. Nothing
between them grows with the square of a length. The teacher's scores of a block serve all S student
layers.

Letters: S student layers, B sequences, T tokens of each, N tokens of all, H query heads, J key
heads, K head dimension, M sampled keys.
"""

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
from oisd_kernels.attention.sink import without_sink
from oisd_kernels.attention.spec import (
    Alignment,
    Layer,
    dense_geometry,
    geometry_of,
    pack_statistic,
    packed_geometry,
)
from oisd_kernels.checks import compute_dtype
from oisd_kernels.op import custom_op, keep, kept, untransformed

OP = "attention_divergence"


def attention_divergence(
    q: Tensor,
    k: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    scale_teacher: float | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    key_index: Tensor | None = None,
    lse: Tensor | None = None,
    lse_teacher: Tensor | None = None,
    sink: Tensor | None = None,
    sink_teacher: Tensor | None = None,
    reduction: str = "none",
    impl: str = "auto",
) -> Tensor:
    """Signed, weighted divergence of a layer's attention from the final layer's, per query.

    Two forms, told apart by the teacher's dimensions: dense (B sequences of T tokens) and packed
    (N tokens of all sequences in a row). In the dense form every position counts as a key; pack to
    leave padding out. S student layers against one teacher have one dimension more than it, in
    front: then its scores are computed once for all of them, and the result is [S, B, T] or [S, N].

    Args:
        q: [B, T, H, K] or [N, H, K], or S of them in front, the student's queries after rotary
            embedding. Receives gradient, as `k` does.
        k: [B, T, J, K] or [N, J, K], or S of them, its keys; J divides H.
        q_teacher: [B, T, H, K] or [N, H, K]; K may differ from the student's. Receives no gradient.
        k_teacher: [B, T, J, K] or [N, J, K]; J and K may differ from the student's.
        token_weight: [B, T] or [N], of all layers or S of them, signed, any float dtype; receives
            no gradient. Rows of weight 0 are left out: they give 0 and pass no gradient on, even if
            they hold NaN.
        cu_seqlens: packed form only, int32 or int64 [number of sequences + 1], from 0 to N, never
            falling. None: one sequence. Its values are checked on the CPU only.
        causal: query i sees keys j <= i.
        window: i - window < j <= i if causal, |i - j| < window if not; at least 1. Where the two
            layers have different windows pass the smaller: both distributions are then over the
            keys that both layers see.
        softcap: c of c * tanh(scores / c) in both layers, above 0, applied after the scale.
        scale: multiplies the scores. None: K ** -0.5, each layer's own K.
        scale_teacher: the teacher's. None: as `scale`.
        divergence: "jsd", "forward_kl" = KL(teacher||student), "reverse_kl" = KL(student||teacher).
        beta: the teacher's share of the mixture of "jsd", in (0, 1).
        key_index: int64 [B, T, M] or [N, M], for each query the positions of its sampled keys
            within its own sequence; -1 is an empty slot. Keys that the masks hide are left out,
            duplicates count once, and both distributions are renormalised over the rest, and the
            sinks. A query left without a key gives 0 and no gradient. Its values are checked on the
            CPU only.
        lse, lse_teacher: [B, H, T] or [H, N] (FlashAttention's layout; S of `lse` where there are
            layers), logsumexp of the scaled and capped scores over the visible keys and, as
            `flash_attention` returns it, the layer's sink, where the attention forward has them.
            They save a pass each and must agree with the scores: "reference" checks their shape and
            ignores them. They receive no gradient. Where nearly all mass is on a sink, dsink keeps
            more digits without them.
        sink: [H], or [S, H] of S layers, any float dtype: the score of one more key of each query
            head, which every query sees whatever the masks and `key_index` say, neither scaled nor
            capped, with the value 0 (gpt-oss's learned sink). Receives gradient. At -inf its key
            has the probability 0. A KL whose first distribution alone has that key is infinite: a
            row then gives 1e38 or so, -log of the lowest finite number times that probability. The
            gradient of such a forward KL is still q - p, that of a reverse KL as large.
        sink_teacher: [H], the teacher's. Receives no gradient. Of a layer without a sink, beside
            one that has it, that key has the probability 0.
        reduction: "none"; "sum"; "mean", which divides by the number of rows of weight other than 0
            (the result is 0 if there is none).
        impl: "torch" (blocks of scores, any device; asks the device for lengths and kept rows),
            "triton" (kernels on a GPU, or under TRITON_INTERPRET=1; K at most 256), "reference"
            (maps in memory, plain autograd, which alone can be differentiated twice). "auto" is
            "triton" on a GPU and "torch" elsewhere. "cuda": the kernels of csrc/, never "auto" yet;
            bf16 and fp16 at K of 64 and 128, without key_index, docs/csrc.md.

    Returns:
        token_weight * divergence in nats, mean over heads, [B, T] or [N], with S in front
        where there are layers, or a scalar. float32;
        float64 if q, k or the teacher's is.

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above, lse comes with key_index (it
            covers all keys), or a KL is infinite: only its first layer has a sink, that of the
            teacher in "forward_kl", of the student in "reverse_kl".

    Source: arXiv 2605.29089, eq. 8 to 10; the weight is its clipped advantage.
    """
    checks.check_dims(OP, "q_teacher", q_teacher, {3: "[N, H, K]", 4: "[B, T, H, K]"})
    packed = q_teacher.dim() == 3
    letters = "N" if packed else "B, T"
    stacked = f"[S, {letters}, H, K]"
    forms = {q_teacher.dim(): f"[{letters}, H, K]", q_teacher.dim() + 1: stacked}
    checks.check_dims(OP, "q", q, forms)
    layers = list(q.shape[: q.dim() - q_teacher.dim()])  # [] or [S]
    *rows, heads, _ = q.shape[len(layers) :]
    device = q.device
    if layers == [0]:
        raise checks.argument_error(OP, "q", "have at least one layer", list(q.shape))
    in_front = f"S, {letters}" if layers else letters
    check_layer(OP, q, k, "", in_front, [*layers, *rows], heads, device)
    check_layer(OP, q_teacher, k_teacher, "_teacher", letters, rows, heads, device)
    if token_weight is not None:
        own = layers if isinstance(token_weight, Tensor) and token_weight.dim() > len(rows) else []
        layout = f"[{in_front if own else letters}]"
        sizes = [*own, *rows]
        checks.check_tensor(OP, "token_weight", token_weight, layout, sizes, device=device)
    if cu_seqlens is not None:
        check_cu_seqlens(OP, cu_seqlens, rows, q)
    check_masks(OP, causal, window, softcap)
    checks.check_positive(OP, "scale", scale, optional=True)
    checks.check_positive(OP, "scale_teacher", scale_teacher, optional=True)
    checks.check_divergence(OP, divergence, beta)
    check_sink(OP, "sink", sink, heads, layers, device)
    check_sink(OP, "sink_teacher", sink_teacher, heads, [], device)
    check_sinks_meet(OP, divergence, sink, sink_teacher)
    if key_index is not None:
        _check_key_index(key_index, letters, rows, cu_seqlens, q)
    layout, sizes = ("H, N", (heads, *rows)) if packed else ("B, H, T", (rows[0], heads, rows[1]))
    for name, x, own in (("lse", lse, layers), ("lse_teacher", lse_teacher, [])):
        if x is not None and key_index is not None:
            remedy = "it covers all keys, key_index only some: pass one of them"
            raise checks.argument_error(OP, name, "be None beside key_index", "a tensor", remedy)
        if x is not None:
            shape = f"[{'S, ' if own else ''}{layout}]"
            checks.check_tensor(OP, name, x, shape, [*own, *sizes], device=device)
    checks.check_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    chosen = implementation.choose(OP, impl, [q, q_teacher], softcap, key_index is not None)
    if chosen == "reference":
        return reference.attention_divergence(
            q, k, q_teacher, k_teacher, token_weight=token_weight, cu_seqlens=cu_seqlens,
            causal=causal, window=window, softcap=softcap, scale=scale,
            scale_teacher=scale_teacher, divergence=divergence, beta=beta, key_index=key_index,
            lse=lse, lse_teacher=lse_teacher, sink=sink, sink_teacher=sink_teacher,
            reduction=reduction,
        )  # fmt: skip

    # The op takes everything packed, and one layer as S = 1.
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if scale_teacher is None:
        scale_teacher = scale
    factor_teacher = float(q_teacher.shape[-1] ** -0.5 if scale_teacher is None else scale_teacher)
    shape = q.shape[:-2]  # with S in front, if there are layers
    if not layers:
        q, k, lse = q[None], k[None], None if lse is None else lse[None]
    if sink is not None:
        sink = sink.expand(len(q), -1)
    masks = causal, window, softcap
    if packed:
        geometry = packed_geometry(q, rows[0], cu_seqlens, *masks)
    else:
        geometry = dense_geometry(q, rows[0], rows[1], *masks)
        q, k = q.flatten(1, 2), k.flatten(1, 2)
        q_teacher, k_teacher = q_teacher.flatten(0, 1), k_teacher.flatten(0, 1)
        lse = None if lse is None else pack_statistic(lse)
        lse_teacher = None if lse_teacher is None else pack_statistic(lse_teacher)
    weight = token_weight
    if weight is not None:
        weight = weight.detach().expand(shape).reshape(q.shape[:2])
    call = DivergenceCall(
        q, k, q_teacher.detach(), k_teacher.detach(), weight, geometry.cu_seqlens,
        None if key_index is None else key_index.flatten(0, -2),
        of_keys(lse, sink), of_keys(lse_teacher, sink_teacher), geometry.max_length, *masks,
        factor, factor_teacher, divergence, float(beta), chosen, sink, detached(sink_teacher),
    )  # fmt: skip
    loss = divergence_op(*untransformed(call))[0].view(shape)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = loss.numel() if weight is None else (weight != 0).sum()
    return loss.sum() / torch.as_tensor(count, device=loss.device).clamp_min(1)


def detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def of_keys(lse: Tensor | None, sink: Tensor | None) -> Tensor | None:
    """As the op is given it: over the keys alone, detached."""
    return None if lse is None else without_sink(lse.detach(), detached(sink))


def _check_key_index(
    key_index: Tensor, letters: str, rows: list[int], cu_seqlens: Tensor | None, q: Tensor
) -> None:
    checks.check_tensor(
        OP,
        "key_index",
        key_index,
        f"[{letters}, M]",
        (*rows, None),
        dtypes=checks.INDEX_DTYPES,
        device=q.device,
    )
    length: int | Tensor = rows[-1]
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        length = cu_seqlens.diff().repeat_interleave(cu_seqlens.diff())[:, None]
    remedy = "positions count from 0 within the query's own sequence, -1 is an empty slot"
    checks.check_values(OP, "key_index", key_index, -1, length, remedy)


class DivergenceCall(NamedTuple):
    """The op's arguments, and those of its backward."""

    q: Tensor  # [S, N, H, K]
    k: Tensor  # [S, N, J, K]
    q_teacher: Tensor  # [N, H, Kt]
    k_teacher: Tensor  # [N, Jt, Kt]
    weight: Tensor | None  # [S, N]; None for ones
    cu_seqlens: Tensor  # [B + 1] int32
    key_index: Tensor | None  # [N, M]
    lse: Tensor | None  # [S, H, N], over the keys alone, as the next
    lse_teacher: Tensor | None  # [H, N]
    length: int | None  # of the longest sequence, where the host knows it
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    scale_teacher: float
    divergence: str
    beta: float
    impl: str  # "torch", "triton" or "cuda"
    sink: Tensor | None = None  # [S, H]
    sink_teacher: Tensor | None = None  # [H]
    statistic: Tensor | None = None  # [S, H, N]; this and the next of the backward alone
    upstream: Tensor | None = None  # [S, N]


class DivergenceResult(NamedTuple):
    """All but the first carry no gradient, and are empty where not needed."""

    loss: Tensor  # [S, N]: weight * divergence; rows of weight 0 hold 0
    lse: Tensor  # [S, H, N]
    lse_teacher: Tensor  # [H, N]
    statistic: Tensor  # [S, H, N], over the keys alone


class DivergenceGradient(NamedTuple):
    dq: Tensor
    dk: Tensor
    dsink: Tensor  # [S, H]; empty without a sink


def weighted(weight: Tensor | None, value: Tensor) -> Tensor:
    # 0 * NaN is NaN: a row that one layer keeps may be dropped by another.
    return value if weight is None else torch.where(weight == 0, 0, weight.to(value.dtype) * value)


def _run(call: DivergenceCall) -> DivergenceResult:
    result, geometry = _allocate(call), geometry_of(call)
    kept_rows = None if call.weight is None else (call.weight != 0).any(0)
    kind = kept_rows, call.divergence, call.beta, geometry
    lse, lse_teacher = call.lse, call.lse_teacher
    if call.key_index is not None:
        student = Layer(call.q, call.k, result.lse, call.scale, call.sink)
        teacher = _teacher(call, result.lse_teacher)
        value, lse, lse_teacher, statistic = implementation.sampled_statistics(
            call.impl, student, teacher, call.key_index, *kind
        )
        result = result._replace(lse=lse, lse_teacher=lse_teacher)
    else:
        if lse is None:
            layers = zip(call.q.unbind(0), call.k.unbind(0), strict=True)
            found = [
                implementation.logsumexp(call.impl, *layer, geometry, call.scale, kept_rows)
                for layer in layers
            ]
            lse = torch.stack(found)
            result = result._replace(lse=lse)
        if lse_teacher is None:
            lse_teacher = implementation.logsumexp(
                call.impl, call.q_teacher, call.k_teacher, geometry, call.scale_teacher, kept_rows
            )
            result = result._replace(lse_teacher=lse_teacher)
        student = Layer(call.q, call.k, lse, call.scale, call.sink)
        teacher = _teacher(call, lse_teacher)
        value, statistic = implementation.statistics(call.impl, student, teacher, *kind)
    if call.divergence != "forward_kl":
        result = result._replace(statistic=statistic)
    return result._replace(loss=weighted(call.weight, value))


def _teacher(call: DivergenceCall, lse: Tensor) -> Layer:
    return Layer(call.q_teacher, call.k_teacher, lse, call.scale_teacher, call.sink_teacher)


def _allocate(call: DivergenceCall) -> DivergenceResult:
    layers, tokens, heads, _ = call.q.shape
    compute = compute_dtype(call.q, call.k, call.q_teacher, call.k_teacher)

    def zeros(*shape: int, wanted: bool = True) -> Tensor:
        return call.q.new_zeros(shape if wanted else [0] * len(shape), dtype=compute)

    # Over sampled keys the torch functions keep nothing.
    full = call.key_index is None or call.impl != "torch"
    return DivergenceResult(
        zeros(layers, tokens),
        zeros(layers, heads, tokens, wanted=full and call.lse is None),
        zeros(heads, tokens, wanted=full and call.lse_teacher is None),
        zeros(layers, heads, tokens, wanted=full and call.divergence != "forward_kl"),
    )


def _save(ctx: Any, call: DivergenceCall, result: DivergenceResult) -> None:
    ctx.mark_non_differentiable(*result[1:])
    lse = result.lse if call.lse is None else call.lse
    lse_teacher = result.lse_teacher if call.lse_teacher is None else call.lse_teacher
    keep(ctx, call._replace(lse=lse, lse_teacher=lse_teacher, statistic=result.statistic))


def _backward(ctx: Any, upstream: DivergenceResult) -> dict[str, Tensor | None]:
    (call,) = kept(ctx)
    dq, dk, dsink = divergence_backward(*call._replace(upstream=upstream.loss))
    return {"q": dq, "k": dk, "sink": None if call.sink is None else dsink}


def _gradient(call: DivergenceCall) -> DivergenceGradient:
    assert call.upstream is not None
    row_weight = weighted(call.weight, call.upstream) / call.q.shape[2]
    layers = [_layer_gradient(call, layer, row_weight[layer]) for layer in range(len(call.q))]
    dq, dk, dsink = zip(*layers, strict=True)
    # Without a sink each layer's is empty.
    return DivergenceGradient(torch.stack(dq), torch.stack(dk), torch.stack(dsink))


def _layer_gradient(
    call: DivergenceCall, layer: int, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    assert call.lse is not None and call.lse_teacher is not None and call.statistic is not None
    lse, statistic = (x[layer] if len(x) else x for x in (call.lse, call.statistic))
    teacher = _teacher(call, call.lse_teacher)
    alignment = Alignment(teacher, row_weight, statistic, call.divergence, call.beta)
    sink = None if call.sink is None else call.sink[layer]
    student, geometry = (
        Layer(call.q[layer], call.k[layer], lse, call.scale, sink),
        geometry_of(call),
    )
    if call.key_index is not None:
        dq, dk, dsink = implementation.sampled_backward(
            call.impl, student, alignment, call.key_index, geometry
        )
    else:
        dq, dk, _, dsink = implementation.backward(call.impl, student, geometry, None, alignment)
    return dq, dk, row_weight.new_zeros(0) if dsink is None else dsink.to(row_weight.dtype)


def _allocate_gradient(call: DivergenceCall) -> DivergenceGradient:
    assert call.upstream is not None
    sink = (len(call.q), 0) if call.sink is None else call.sink.shape
    dsink = call.upstream.new_empty(sink)
    return DivergenceGradient(call.q.new_empty(call.q.shape), call.k.new_empty(call.k.shape), dsink)


divergence_backward = custom_op(
    "attention_pass_backward",
    DivergenceCall, DivergenceGradient, _gradient, _allocate_gradient,
)  # fmt: skip
divergence_op = custom_op(
    "attention_pass", DivergenceCall, DivergenceResult, _run, _allocate, _save, _backward
)
