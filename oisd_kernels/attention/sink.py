"""A learned sink: one more key of a head whose score is a number, without a value and a position.

    lse'     = log(exp(sink) + exp(lse)),    lse over the keys alone
    P_sink   = exp(sink - lse')

Kernels that are handed lse' find the keys' probabilities right as they stand. What is left of the
sink is elementwise in rows and heads, and is here: its term of the divergence, its part of a row's
statistic, and its gradient. With `inner` and `factor` of `oisd_kernels.divergences_torch`, factor
times the row's weight g, and delta = rowsum(dO * O) - dLse,

    dsink = sum_i P_sink * (factor * (inner_sink - <P, inner>) - delta)      jsd, reverse_kl
    dsink = sum_i g * (P_sink - T_sink) - P_sink * delta                     forward_kl

Neither scale nor softcap apply to a sink. Where nearly all mass is on it both differences cancel,
so they are formed from what the keys have: inner_sink * (1 - P_sink) - sum_j P_j inner_j, with
1 - P_sink = sigmoid(lse - sink). This is why lse and the statistic are kept of the keys alone.
A layer without a sink, beside one that has it, has T_sink or P_sink = 0.

Letters: S student layers (perhaps absent), N tokens, H query heads.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from oisd_kernels.attention.spec import Alignment, Layer
from oisd_kernels.divergences_torch import gradient_factor, inner, row_terms


def with_sink(lse: Tensor, sink: Tensor | None) -> Tensor:
    """lse' [S, H, N] of the keys and the sink [S, H]."""
    return lse if sink is None else torch.logaddexp(lse, sink.to(lse.dtype)[..., None])


def without_sink(lse: Tensor, sink: Tensor | None) -> Tensor:
    """lse of the keys alone from lse'; few digits are left where nearly all mass is on the sink."""
    if sink is None:
        return lse
    share = (sink.to(lse.dtype)[..., None] - lse).clamp_max(0)  # log P_sink
    return lse + (-torch.expm1(share)).log()


def whole(layer: Layer) -> Layer:
    """As the kernels want it: the sink within lse."""
    return layer._replace(lse=with_sink(layer.lse, layer.sink), sink=None)


class _Share:
    """Of the sink in each row, [S, H, N]."""

    def __init__(self, layer: Layer):
        lse, sink = layer.lse, layer.sink
        lowest = torch.finfo(lse.dtype).min
        if sink is None:
            self.log = torch.full_like(lse, lowest)
            self.own, self.rest = torch.zeros_like(lse), torch.ones_like(lse)
        else:
            ahead = sink.to(lse.dtype)[..., None] - lse
            self.log = logsigmoid(ahead).clamp_min(lowest)
            self.own, self.rest = torch.sigmoid(ahead), torch.sigmoid(-ahead)


def add_terms(
    value: Tensor,  # [S, N], mean over heads of the divergence's terms of the keys
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,  # [N] bool
    divergence: str,
    beta: float,
) -> Tensor:
    """The divergence of keys and sink; rows that are not kept stay as they are."""
    if student.sink is None and teacher.sink is None:
        return value
    lq, lp = _Share(student).log, _Share(teacher).log
    d = lp - lq
    p, q = (x.exp()[..., None] for x in (lp.expand_as(lq), lq))
    out, scratch = torch.empty_like(q), torch.empty_like(q)
    terms, _ = row_terms(out, q, d[..., None], p, scratch, divergence, beta, False)
    terms = terms.mean(-2)
    return value + (terms if keep is None else torch.where(keep, terms, 0))


def whole_alignment(student: Layer, alignment: Alignment) -> Alignment:
    """As the kernels want it: the sinks within the teacher's lse and in the statistic."""
    statistic = alignment.statistic
    if student.sink is not None and alignment.divergence != "forward_kl":
        share = _Share(student)
        own = _inner(share, alignment) * share.own
        statistic = statistic + (own if alignment.divergence == "jsd" else -own)
    return alignment._replace(teacher=whole(alignment.teacher), statistic=statistic)


def gradient(
    student: Layer,  # of one layer
    delta: Tensor | None,  # [H, N]; None: the alignment alone
    alignment: Alignment | None,
) -> Tensor:
    """dsink [H]."""
    share = _Share(student)
    rows = torch.zeros_like(share.own) if delta is None else -share.own * delta
    if alignment is not None:
        weight = alignment.row_weight.to(rows.dtype)
        if alignment.divergence == "forward_kl":
            other = _Share(alignment.teacher)
            high = share.own > 0.5
            pull = torch.where(high, other.rest - share.rest, share.own - other.own)
        else:
            keys = alignment.statistic if alignment.divergence == "jsd" else -alignment.statistic
            pull = share.own * (_inner(share, alignment) * share.rest - keys)
            pull = pull * gradient_factor(alignment.divergence, alignment.beta)
        # A row of weight 0 may hold NaN.
        rows = rows + torch.where(weight != 0, weight * pull, 0)
    return rows.sum(-1)


def _inner(share: _Share, alignment: Alignment) -> Tensor:
    d = _Share(alignment.teacher).log - share.log
    return inner(d, torch.empty_like(d), alignment.divergence, alignment.beta)
