"""The elementwise mathematics of JSD and KL in torch, in place, for the lens and the attention.

p teacher, q student, lp and lq their logarithms, clamped to the lowest finite number, so that
D = lp - lq is never NaN where both are 0. A divergence of a row is the sum of its terms; its
gradient to the student's scores is `factor * q * (inner - <q, inner>)`, but for the forward KL,
where it is q - p. The multiples of p and q in the terms are constants when summed; they make
rounding cancel near p = q, as in `oisd_kernels.reference`.

    jsd         inner = s = softplus(x), x = D + log(beta/(1-beta))     factor = -(1-beta)
    reverse_kl  inner = D                                               factor = -1

The mean of the JSD is <q, s> and not the KL: where p and q are disjoint the KL is log 2 but for the
last digits, which are all that the gradient is made of.

The formula stands in four places, which the tests hold against each other: `reference` is the
truth, for any dtype and differentiable twice; here it is in place, because a CPU's time goes into
memory; `divergences` is Triton's and csrc/attention_divergence.h CUDA's, which torch cannot call.
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp_(x: Tensor) -> Tensor:
    """e^x in place, off by up to |x| roundings of 1: not for the terms of a KL, which cancel.

    On a CPU torch takes 2^x in a third of the time of e^x.
    """
    return x.mul_(LOG2_E).exp2_()


def exp(x: Tensor, out: Tensor) -> Tensor:
    """As `exp_`, elsewhere."""
    return torch.mul(x, LOG2_E, out=out).exp2_()


def row_terms(
    out: Tensor,
    q: Tensor,
    d: Tensor,
    p: Tensor,
    t: Tensor,
    divergence: str,
    beta: float,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over the entries given, of which a row may have more elsewhere, each [...].

    They are the divergence's and, with_mean, `<q, inner>` (0 for the forward KL). All arguments are
    [..., V], p perhaps [1, V]; d holds D before and `inner` after, p and q stay, t is scratch, and
    `out` is left holding what `row_gradient` needs of it.
    """
    if divergence == "forward_kl":
        torch.sub(q, p, out=out)
        value = d.mul_(p).add_(out).sum(-1)
        return value, torch.zeros_like(value)
    if divergence == "reverse_kl":
        torch.mul(d, q, out=out)
        mean = out.sum(-1)
        return torch.sub(p, q, out=t).sub_(out).sum(-1), mean
    x = _shifted(d, beta)
    l1p = _log1p_exp_neg_abs(x, out)
    # log(p/m) = min(x, 0) - l1p - log(beta); log(q/m) = -s - log(1-beta).
    torch.clamp_max(x, 0, out=t).sub_(l1p).sub_(math.log(beta)).mul_(p)
    value = beta * t.sum(-1)
    s = x.clamp_min_(0).add_(l1p)
    torch.add(s, math.log1p(-beta), out=t).mul_(q)
    value -= (1 - beta) * t.sum(-1)
    return value, torch.mul(s, q, out=t).sum(-1) if with_mean else torch.zeros_like(value)


def row_gradient(
    out: Tensor, q: Tensor, inner: Tensor, mean: Tensor, divergence: str, beta: float
) -> None:
    """out = the divergence's gradient to the scores, from what `row_terms` left and summed."""
    if divergence == "forward_kl":
        return  # it holds q - p
    torch.mul(inner.sub_(mean[..., None]), q, out=out)
    out.mul_(gradient_factor(divergence, beta))


def inner(d: Tensor, t: Tensor, divergence: str, beta: float) -> Tensor:
    """`inner` of `row_terms` alone, in the memory of d; not of the forward KL, which has none."""
    if divergence == "reverse_kl":
        return d
    x = _shifted(d, beta)
    l1p = _log1p_exp_neg_abs(x, t)
    return x.clamp_min_(0).add_(l1p)


def gradient_factor(divergence: str, beta: float) -> float:
    return beta - 1 if divergence == "jsd" else -1.0


def _shifted(d: Tensor, beta: float) -> Tensor:
    """x, in the memory of d."""
    return d.add_(math.log(beta / (1 - beta))) if beta != 0.5 else d


def _log1p_exp_neg_abs(x: Tensor, out: Tensor) -> Tensor:
    return torch.abs(x, out=out).mul_(-LOG2_E).exp2_().log1p_()
