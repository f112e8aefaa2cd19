"""Row arithmetic of the attention divergence on blocks of log-probabilities, in torch, in place.

P is the student's attention, T the teacher's, lq and lp their logarithms, D = lp - lq,
s = softplus(D + log(beta/(1-beta))), a a row's statistic, g its weight. A divergence's gradient to
the student's scores is P * E, but for the forward KL, where it is g * (P - T).

    jsd         E = -(1-beta) g (s - a)     a = <P, s> = -KL(P||mixture) - log(1-beta)
    reverse_kl  E = -g (D + a)              a = KL(P||T)

The formulas are those of `reference`; the gradient of the JSD is in its centred form. Its statistic
is <P, s> and not the KL: where P and T are disjoint the KL is log 2 but for the last digits, which
are all that the gradient is made of.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Blocks by name, made once each and used again."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.blocks: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        block = self.blocks.get(name)
        if block is None or block.numel() < count:
            block = self.blocks[name] = torch.empty(count, dtype=self.dtype, device=self.device)
        return block[:count].view(*shape)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def row_sums(
    lp: Tensor,  # [..., c]
    lq: Tensor,  # [..., c], overwritten
    p: Tensor,  # exp(lp)
    scratch: Scratch,
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Terms of the divergence and of the statistic, summed over a block's keys: [..., 1] each.

    The terms hold multiples of P and T whose sums are constants, so that rounding cancels near
    P = T.
    """
    q = torch.exp(lq, out=scratch("q", lq.shape))
    d = torch.sub(lp, lq, out=lq)
    if divergence == "forward_kl":
        value = q.sub_(p).addcmul_(p, d).sum(-1, keepdim=True)
        return value, value
    if divergence == "reverse_kl":
        statistic = -d.mul_(q).sum(-1, keepdim=True)
        return d.add_(q).neg_().add_(p).sum(-1, keepdim=True), statistic
    x = d if beta == 0.5 else d.add_(math.log(beta / (1 - beta)))
    l1p = _log1p_exp_neg_abs(x, scratch)
    term = torch.clamp_max(x, 0, out=scratch("term", x.shape)).sub_(l1p)
    to_teacher = term.sub_(math.log(beta)).mul_(p).sum(-1, keepdim=True)  # KL(T||mixture)
    s = x.clamp_min_(0).add_(l1p)
    statistic = torch.mul(s, q, out=term).sum(-1, keepdim=True)
    to_student = -s.add_(math.log1p(-beta)).mul_(q).sum(-1, keepdim=True)  # KL(P||mixture)
    return beta * to_teacher + (1 - beta) * to_student, statistic


def score_pull(
    lp: Tensor,  # [..., c], overwritten
    lq: Tensor,  # [..., c]
    weight: Tensor,  # [..., 1]
    statistic: Tensor | None,  # [..., 1]
    scratch: Scratch,
    divergence: str,
    beta: float,
) -> Tensor:
    """E, or g * T for the forward KL, in the memory of lp."""
    if divergence == "forward_kl":
        return lp.exp_().mul_(weight)
    assert statistic is not None
    if divergence == "reverse_kl":
        return torch.sub(lq, lp, out=lp).sub_(statistic).mul_(weight)
    x = lp.sub_(lq)
    if beta != 0.5:
        x.add_(math.log(beta / (1 - beta)))
    l1p = _log1p_exp_neg_abs(x, scratch)
    s = x.clamp_min_(0).add_(l1p)
    return s.sub_(statistic).mul_((beta - 1) * weight)


def _log1p_exp_neg_abs(x: Tensor, scratch: Scratch) -> Tensor:
    return torch.abs(x, out=scratch("l1p", x.shape)).neg_().exp_().log1p_()
