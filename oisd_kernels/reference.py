"""Every op in plain PyTorch: the truth that the kernels are held to.

Letters: S student layers, N tokens, D width, E the teacher's width, V vocabulary, B sequences,
T queries, H query heads, J key/value heads, K head dimension, M sampled keys, R rows that are
computed.

Conventions. p is the teacher's distribution and never receives gradient, q the student's;
lp, lq are their logarithms and D = lp - lq.

    jsd         beta*KL(p||m) + (1-beta)*KL(q||m),  m = beta*p + (1-beta)*q
    forward_kl  KL(p||q)
    reverse_kl  KL(q||p)

The functions assume checked arguments; the public functions of the same names do the checking.
Inputs are raised to float32 before the matmul (to float64 where an input is float64), under a
disabled autocast; call `backward()` outside autocast, as torch asks, or its matmuls are rounded.
Matmuls obey `torch.set_float32_matmul_precision`. Rows of weight 0 are left out before any matmul,
so that they cost nothing and a NaN in them reaches nothing.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from oisd_kernels.checks import compute_dtype


class LensStats(NamedTuple):
    """What `logit_lens_divergence` saw, in nats at its temperature; no gradient, loss's dtype.

    Rows that were dropped (weight 0) hold 0. With student hidden states [N, D], S is absent.
    """

    student_entropy: Tensor  # [S, N]
    teacher_entropy: Tensor  # [N]; a token is dropped where every layer's weight is 0
    top1_agreement: Tensor  # [S, N]: 1 where student and teacher share the likeliest token
    divergence: Tensor  # [S, N], not multiplied by the weight


class LinearLogprob(NamedTuple):
    """Per row, in nats; only `logprob` carries gradient."""

    logprob: Tensor  # [N]
    entropy: Tensor  # [N]
    logsumexp: Tensor  # [N]


def logit_lens_divergence(
    hidden: Tensor,  # [S, N, D] or [N, D]
    teacher_hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,  # [V]
    token_weight: Tensor | None = None,  # [S, N] or [N]
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: bool = False,
    max_bytes: int | None = None,
) -> Tensor | tuple[Tensor, LensStats]:
    """`oisd_kernels.logit_lens_divergence` with all logits in memory, whatever `max_bytes` says."""
    del max_bytes
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = compute_dtype(hidden, teacher_hidden, weight, bias)
        rows = hidden.shape[:-1]  # (S, N) or (N,)
        row_weight = _row_weight(token_weight, rows, dtype, hidden.device)
        keep = row_weight != 0
        token_keep = keep if keep.dim() == 1 else keep.any(0)  # [N]

        with torch.no_grad():
            teacher_logits = _logits(
                teacher_hidden[token_keep], weight, bias, temperature, logit_softcap, dtype
            )
            lp_token = _log_softmax(teacher_logits)
            # Layers share the teacher: kept token n is row `slot[n]` of lp_token.
            slot = token_keep.cumsum(0) - 1
            lp = lp_token[slot.expand(rows)[keep]]  # [R, V]

        if not grad_weight:
            weight = weight.detach()
            bias = None if bias is None else bias.detach()
        lq = _log_softmax(_logits(hidden[keep], weight, bias, temperature, logit_softcap, dtype))

        row_divergence = _divergence(lp, lq, divergence, beta)  # [R]
        loss = _reduce(row_weight, _put_back(row_divergence, keep), reduction)
        if not return_stats:
            return loss
        with torch.no_grad():
            agreement = (lq.argmax(-1) == lp.argmax(-1)).to(dtype)
            stats = LensStats(
                student_entropy=_put_back(_entropy(lq), keep),
                teacher_entropy=_put_back(_entropy(lp_token), token_keep),
                top1_agreement=_put_back(agreement, keep),
                divergence=_put_back(row_divergence.detach(), keep),
            )
        return loss, stats


def distillation_divergence(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [N, E]
    teacher_weight: Tensor,  # [V, E]
    *,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    token_weight: Tensor | None = None,  # [N]
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    reduction: str = "none",
    return_entropy: bool = False,
    max_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`oisd_kernels.distillation_divergence` with all logits in memory."""
    del max_bytes
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = compute_dtype(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
        row_weight = _row_weight(token_weight, hidden.shape[:1], dtype, hidden.device)
        keep = row_weight != 0

        def log_probability(
            rows: Tensor, head: Tensor, head_bias: Tensor | None, scale: float, cap: float | None
        ) -> Tensor:  # [R, V]
            logits = scale * _logits(rows[keep], head, head_bias, 1.0, None, dtype)
            return _log_softmax(_softcap(logits, cap) / temperature)

        with torch.no_grad():
            teacher = teacher_hidden, teacher_weight, teacher_bias
            lp = log_probability(*teacher, teacher_logit_scale, teacher_logit_softcap)
        lq = log_probability(hidden, weight, bias, logit_scale, logit_softcap)
        per_row = _put_back(_divergence(lp, lq, divergence, beta), keep)
        loss = _reduce(row_weight, per_row, reduction)
        return (loss, _put_back(_entropy(lq.detach()), keep)) if return_entropy else loss


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    max_bytes: int | None = None,
) -> LinearLogprob:
    """`oisd_kernels.linear_logprob` with all logits in memory, whatever `max_bytes` says."""
    del max_bytes
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = compute_dtype(hidden, weight, bias)
        logits = _logits(hidden, weight, bias, temperature, logit_softcap, dtype)  # [N, V]
        # Of the label against the others, and not through a softmax, in whose gradient 1 - p of a
        # confident token has no digits left.
        lowest, label = torch.finfo(dtype).min, labels[:, None]
        others = logits.scatter(-1, label, lowest).logsumexp(-1)
        logprob = logsigmoid(logits.gather(-1, label)[:, 0] - others)
        logits = logits.detach()
        logprob = with_masked_labels(logprob)
        return LinearLogprob(logprob, _entropy(_log_softmax(logits)), logits.logsumexp(-1))


# No log-probability of a token that a model can give is as low: some bias of -inf or near it, or a
# kernel's number for it, stands behind.
_MASKED = -1e29


def with_masked_labels(logprob: Tensor) -> Tensor:
    """Log-probabilities [N] of labels, -inf for one that a bias masks; the gradient stays."""
    return logprob + torch.where(logprob.detach() < _MASKED, -torch.inf, 0.0)


def attention(
    q: Tensor,  # [B, T, H, K] or [N, H, K]
    k: Tensor,  # [B, T, J, K] or [N, J, K]
    v: Tensor,  # as k
    *,
    cu_seqlens: Tensor | None = None,  # [B + 1], packed form only
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,  # [H]
) -> tuple[Tensor, Tensor]:  # [B, T, H, K] or [N, H, K]; [B, H, T] or [H, N]
    """`oisd_kernels.flash_attention` with the maps [B, H, T, T] in memory."""
    with torch.autocast(q.device.type, enabled=False):
        dtype = compute_dtype(q, k, v)
        rows = q.shape[:-2]  # (B, T) or (N,)
        index, valid = _sequence_index(rows, cu_seqlens, q.device)
        queries, keys, values = (_take(x.flatten(0, -3), index, valid).to(dtype) for x in (q, k, v))
        scores = _attention_scores(queries, keys, scale, softcap)  # [B, H, T, T]
        if scores.numel() == 0:
            return q * 1, scores.new_zeros((*rows[:-1], q.shape[-2], rows[-1]))
        lowest = torch.finfo(dtype).min
        scores = scores.masked_fill(~_visible_keys(valid, causal, window)[:, None], lowest)
        lse = _beside_sink(scores, sink).logsumexp(-1)  # [B, H, T]
        weights = (scores - lse[..., None]).exp().unflatten(1, (k.shape[-2], -1))
        out = torch.einsum("bjgqc,bcjk->bqjgk", weights, values).flatten(2, 3)
        # Back to the rows of q, from which those past a sequence's end are absent.
        out = (
            torch.zeros_like(out[0, :1])
            .expand(rows.numel(), -1, -1)
            .index_put((index[valid],), out[valid])
        )
        flat_lse = lse.transpose(1, 2)
        flat_lse = lse.new_zeros(rows.numel(), q.shape[-2]).index_put(
            (index[valid],), flat_lse[valid]
        )
        return out.view(q.shape).to(q.dtype), flat_lse.view(*rows, -1).transpose(-1, -2)


def attention_divergence(
    q: Tensor,  # [B, T, H, K] or [N, H, K], or S of them
    k: Tensor,  # [B, T, J, K] or [N, J, K], or S of them
    q_teacher: Tensor,  # [B, T, H, K] or [N, H, K], K may differ
    k_teacher: Tensor,  # [B, T, J, K] or [N, J, K], J and K may differ
    *,
    token_weight: Tensor | None = None,  # [B, T] or [N], or S of them
    cu_seqlens: Tensor | None = None,  # [B + 1], packed form only
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    scale_teacher: float | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    key_index: Tensor | None = None,  # [B, T, M] or [N, M]
    lse: Tensor | None = None,
    lse_teacher: Tensor | None = None,
    sink: Tensor | None = None,  # [H], or S of them
    sink_teacher: Tensor | None = None,  # [H]
    reduction: str = "none",
) -> Tensor:
    """`oisd_kernels.attention_divergence` with the maps [B, H, T, T] in memory.

    `lse` and `lse_teacher` save kernels a pass over the keys; nothing here needs them.
    """
    del lse, lse_teacher
    with torch.autocast(q.device.type, enabled=False):
        dtype = compute_dtype(q, k, q_teacher, k_teacher)
        row_weight = _row_weight(token_weight, q.shape[:-2], dtype, q.device)

        def layer(student: _AttentionLayer, keep: Tensor) -> Tensor:
            masks = cu_seqlens, causal, window, key_index
            return _attention_rows(student, teacher, keep, masks, softcap, divergence, beta, dtype)

        scales = scale, scale if scale_teacher is None else scale_teacher
        teacher = _AttentionLayer(q_teacher, k_teacher, scales[1], sink_teacher)
        if q.dim() == q_teacher.dim():
            per_row = layer(_AttentionLayer(q, k, scales[0], sink), row_weight != 0)
        else:
            sinks = [None] * len(q) if sink is None else sink.expand(len(q), -1).unbind(0)
            layers = zip(q.unbind(0), k.unbind(0), sinks, row_weight.unbind(0), strict=True)
            per_row = torch.stack(
                [layer(_AttentionLayer(q, k, scales[0], own), w != 0) for q, k, own, w in layers]
            )
        return _reduce(row_weight, per_row, reduction)


class _AttentionLayer(NamedTuple):
    q: Tensor
    k: Tensor
    scale: float | None
    sink: Tensor | None


def _attention_rows(
    student: _AttentionLayer,
    teacher: _AttentionLayer,
    keep: Tensor,
    masks: tuple[Tensor | None, bool, int | None, Tensor | None],
    softcap: float | None,
    divergence: str,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """Divergence of one layer's rows, [B, T] or [N], mean over heads; 0 where not kept."""
    cu_seqlens, causal, window, key_index = masks
    rows, device = student.q.shape[:-2], student.q.device  # (B, T) or (N,)
    # Both forms become indices [B, T] into flat tokens; past a sequence's end they are invalid.
    index, valid = _sequence_index(rows, cu_seqlens, device)
    keep = valid & keep.flatten()[index]
    live = keep.any(1)  # sequences without a kept row are left out
    index, valid, keep = index[live], valid[live], keep[live]

    visible = _visible_keys(valid, causal, window)  # [B, T, T]
    if key_index is not None:
        visible &= _sampled_keys(key_index.flatten(0, -2)[index], index.shape[1])
    keep &= visible.any(2)
    # A key that no kept row sees is cleared: in the backward its zero weight would multiply it,
    # and 0 * NaN is NaN.
    seen = (visible & keep[:, :, None]).any(1)  # [B, T]
    has_sink = student.sink is not None or teacher.sink is not None

    def log_attention(layer: _AttentionLayer) -> Tensor:
        queries = _take(layer.q.flatten(0, -3), index, keep).to(dtype)  # [B, T, H, K]
        keys = _take(layer.k.flatten(0, -3), index, seen).to(dtype)  # [B, T, J, K]
        scores = _attention_scores(queries, keys, layer.scale, softcap)  # [B, H, T, T]
        events = visible[:, None]
        if not has_sink:
            return _log_softmax(scores, events)
        # One more event; of a layer without a sink its probability is 0.
        scores = _beside_sink(scores, scores.new_zeros(1) if layer.sink is None else layer.sink)
        own = events.new_full((*events.shape[:-1], 1), layer.sink is not None)
        return _log_softmax(scores, torch.cat([events, own], -1))

    with torch.no_grad():
        lp = log_attention(teacher)
    lq = log_attention(student)
    row_divergence = _divergence(lp, lq, divergence, beta).mean(1)  # [B, T]
    per_row = torch.zeros(rows.numel(), dtype=dtype, device=device)
    return per_row.index_put((index[keep],), row_divergence[keep]).view(rows)


def _beside_sink(scores: Tensor, sink: Tensor | None) -> Tensor:
    """[B, H, T, T], or with a sink [H] (or [1]) [B, H, T, T + 1]."""
    if sink is None:
        return scores
    column = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1)


def _attention_scores(
    queries: Tensor, keys: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """queries [B, T, H, K], keys [B, T, J, K] -> [B, H, T, T]."""
    grouped = queries.unflatten(2, (keys.shape[2], -1))  # head h reads key head h // (H/J)
    scores = torch.einsum("bqjgk,bcjk->bjgqc", grouped, keys).flatten(1, 2)
    return _softcap(scores * (keys.shape[-1] ** -0.5 if scale is None else scale), softcap)


def _divergence(lp: Tensor, lq: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergence of each row, [..., V] -> [...], in a form whose autograd keeps its digits.

    The sums of p and of q are constants, so multiples of them may enter without changing the loss
    or its gradient. They are chosen such that near p = q the rounding of log-softmax cancels to
    first order, and such that where p and q are disjoint no large constant joins the gradient,
    which is minute there.
    """
    p, q = lp.exp(), lq.exp()
    D = lp - lq
    if divergence == "forward_kl":
        return (p * D - p + q).sum(-1)
    if divergence == "reverse_kl":
        return (-q * D - q + p).sum(-1)
    # beta*p/m = sigmoid(x) and (1-beta)*q/m = sigmoid(-x): no mixture is formed, none underflows.
    x = D + math.log(beta / (1 - beta))
    teacher = p * (logsigmoid(x) - math.log(beta))  # p * log(p/m)
    student = q * logsigmoid(-x) - q.detach() * math.log1p(-beta)  # q * log(q/m)
    return (beta * teacher + (1 - beta) * student).sum(-1)


def _log_softmax(scores: Tensor, visible: Tensor | None = None) -> Tensor:
    """Log-softmax whose masked entries are the lowest finite number instead of -inf.

    Their probability is exactly 0 and differences stay finite, so they add 0 to loss and gradient,
    but for a forward KL whose teacher gives them something: that is infinite, here as large as
    floats go, and its gradient q - p. So the gradient passes as if the number were -inf.
    A row that sees nothing is uniform: finite, for the caller to drop. Written out, because on CPUs
    torch's log_softmax adds a row up one by one: 8e-6 off in float32 at a vocabulary of 150,000,
    where the pairwise sum of logsumexp is 4e-7 off.
    """
    if scores.numel() == 0:
        return scores  # amax refuses rows without entries
    lowest = torch.finfo(scores.dtype).min
    if visible is not None:
        scores = scores.masked_fill(~visible, lowest)
    scores = scores - scores.detach().amax(-1, keepdim=True)
    return _Finite.apply(scores - scores.logsumexp(-1, keepdim=True))  # pyright: ignore


class _Finite(torch.autograd.Function):
    """The lowest finite number for -inf; the gradient passes, which that of a clamp would not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp_min(torch.finfo(x.dtype).min)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output == torch.finfo(output.dtype).min)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        # A probability of 0 times a logarithm times a weight above 1, which overflows.
        (masked,) = ctx.saved_tensors
        return gradient.masked_fill(masked & gradient.isnan(), 0.0)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore
        return tangent.clone()


def _entropy(lq: Tensor) -> Tensor:
    return -(lq.exp() * lq).sum(-1)


def _logits(
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:  # [R, V]
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return _softcap(logits, softcap) / temperature


def _softcap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _row_weight(
    token_weight: Tensor | None, rows: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if token_weight is None:
        return torch.ones(rows, dtype=dtype, device=device)
    return token_weight.detach().to(dtype).expand(rows)


def _put_back(values: Tensor, keep: Tensor) -> Tensor:
    """The kept rows at their places, 0 elsewhere."""
    zeros = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
    return zeros.index_put((keep,), values)


def _reduce(row_weight: Tensor, per_row: Tensor, reduction: str) -> Tensor:
    loss = row_weight * per_row
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (row_weight != 0).sum().clamp_min(1)


def _sequence_index(
    rows: torch.Size, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Flat index of every (sequence, position), [B, T], and which of them exist, [B, T]."""
    if len(rows) == 2:
        index = torch.arange(rows.numel(), device=device).view(rows)
        return index, torch.ones_like(index, dtype=torch.bool)
    tokens = rows[0]
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, tokens], device=device)
    start, length = cu_seqlens[:-1].long(), cu_seqlens.diff()
    position = torch.arange(max(length.tolist(), default=0), device=device)
    index = start[:, None] + position
    return index.clamp_max(max(tokens - 1, 0)), position < length[:, None]


def _visible_keys(valid: Tensor, causal: bool, window: int | None) -> Tensor:
    """[B, T] existing positions -> [B, T, T], True where a query (dim 1) sees a key (dim 2)."""
    position = torch.arange(valid.shape[1], device=valid.device)
    ahead = position[None, :] - position[:, None]  # [T, T], key minus query
    mask = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        mask = mask & (ahead.abs() < window)
    return mask & valid[:, None, :]


def _sampled_keys(key_index: Tensor, keys: int) -> Tensor:
    """[B, T, M] key positions, -1 = empty slot -> [B, T, keys], True where a key is sampled."""
    mask = key_index.new_zeros((*key_index.shape[:2], keys + 1), dtype=torch.bool)
    # Empty slots, and the rows of padding, fall into a spare column.
    slot = torch.where((key_index < 0) | (key_index >= keys), keys, key_index)
    return mask.scatter(2, slot, True)[..., :keys]


def _take(x: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    """Rows of x [N, H, K] in the order of `index` [B, T], 0 where not kept -> [B, T, H, K]."""
    taken = x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])
    return taken.masked_fill(~keep[:, :, None, None], 0)
