"""The formulas as a user writes them in eager PyTorch today; what torch.compile is given, too.

Logits in the inputs' dtype, softmax in float32, everything in memory. `impl="reference"` of the
ops, which keeps more digits, is measured beside these.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Of two logit tensors [..., V], in nats [...]; the teacher's carry no gradient."""
    lq = F.log_softmax(student.float(), dim=-1)
    lp = F.log_softmax(teacher.detach().float(), dim=-1)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    teacher_part = (lp.exp() * (lp - lm)).sum(-1)
    student_part = (lq.exp() * (lq - lm)).sum(-1)
    return (teacher_part + student_part) / 2


def lens_divergence(hidden: Tensor, final: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """hidden [S, N, D], final [N, D], weight [V, D], factor [N] -> [S, N]."""
    with torch.no_grad():
        teacher = final @ weight.T
    return factor * jensen_shannon(hidden @ weight.T, teacher)


def logprob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden [N, D], weight [V, D], labels [N] -> [N]."""
    return F.log_softmax((hidden @ weight.T).float(), dim=-1).gather(-1, labels[:, None])[:, 0]


def attention_divergence(
    q: Tensor, k: Tensor, q_teacher: Tensor, k_teacher: Tensor, factor: Tensor
) -> Tensor:
    """q [B, T, H, K], k [B, T, J, K], factor [B, T] -> [B, T], mean over heads; causal."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        hidden = torch.ones(q.shape[2], k.shape[2], device=q.device, dtype=torch.bool).triu(1)
        # A large finite number: -inf would make NaN of a difference of logarithms.
        return (q @ k.mT * q.shape[-1] ** -0.5).float().masked_fill(hidden, -1e30)

    with torch.no_grad():
        teacher = scores(q_teacher, k_teacher)
    return factor * jensen_shannon(scores(q, k), teacher).mean(1)
