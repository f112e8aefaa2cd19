"""The clipped policy loss of a token as a function of its log-probability, and its slope.

    ratio = exp(logprob - old),  clipped = clip(ratio, 1 - clip_low, 1 + clip_high)
    loss  = importance * dual(max(-ratio * A, -clipped * A)) + kl_coef * k3,   times weight
    dual(x) = min(x, -dual_clip * A) where A < 0, else x              (arXiv 1912.09729)
    importance = min(exp(old - rollout), tis_cap)
    k3 = exp(ref - logprob) - 1 - (ref - logprob)        unbiased, never negative (Schulman, 2020)

The loss is plain PyTorch and differentiable. The slope is its derivative, written out for the fused
head, which needs it beneath autograd, before the gradient of the logits overwrites them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# e^20 is far outside every clip range; a ratio that overflows would make the gradient NaN even
# where it is clipped.
LIMIT = 20.0


class PolicyTerms(NamedTuple):
    """What the loss of N tokens depends on beside their log-probabilities.

    advantage: [N], of the token's sequence.
    weight: [N], of the token in a loss that is a sum over tokens.
    old_logprob: [N], under the policy that the ratio is taken against; None for the log-probability
        itself, detached (strictly on-policy).
    rollout_logprob: [N], as the sampling engine had it; None for no importance weight.
    ref_logprob: [N], under the reference model; None for no KL term.
    clip_low, clip_high: at least 0; infinite for no bound.
    dual_clip: above 1, or None.
    tis_cap: above 0; infinite for no cap.
    kl_coef: at least 0 and finite.
    """

    advantage: Tensor
    weight: Tensor
    old_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tis_cap: float = 2.0
    kl_coef: float = 0.0

    def constants(self, dtype: torch.dtype) -> "PolicyTerms":
        """The terms in a dtype and without a graph."""
        own: dict[str, Any] = {
            name: x.detach().to(dtype)
            for name, x in self._asdict().items()
            if isinstance(x, Tensor)
        }
        return self._replace(**own)


class PolicyLoss(NamedTuple):
    """The loss of each token and its parts, for metrics."""

    loss: Tensor
    ratio: Tensor
    log_ratio: Tensor
    dual_clipped: Tensor  # bool
    importance: Tensor | None
    k3: Tensor | None


def policy_loss(logprob: Tensor, terms: PolicyTerms) -> PolicyLoss:
    """The loss above, elementwise over tensors of any one shape.

    Source: arXiv 2402.03300, eq. 3, with the variants named at the head of this module.
    """
    advantage = terms.advantage
    old = logprob.detach() if terms.old_logprob is None else terms.old_logprob
    log_ratio = _limited(logprob - old)
    ratio = log_ratio.exp()
    bound, beyond = _clip(ratio, terms)
    loss = torch.where(beyond, -bound * advantage, -ratio * advantage)
    dual_clipped = torch.zeros_like(loss, dtype=torch.bool)
    if terms.dual_clip is not None:
        most = -terms.dual_clip * advantage
        dual_clipped = (advantage < 0) & (loss > most)
        loss = torch.where(dual_clipped, most, loss)
    importance = _importance(old, terms)
    if importance is not None:
        loss = loss * importance
    k3 = None
    if terms.kl_coef and terms.ref_logprob is not None:
        log_ref = _limited(terms.ref_logprob - logprob)
        k3 = log_ref.exp() - 1 - log_ref
        loss = loss + terms.kl_coef * k3
    return PolicyLoss(loss * terms.weight, ratio, log_ratio, dual_clipped, importance, k3)


def policy_slope(logprob: Tensor, terms: PolicyTerms) -> Tensor:
    """d loss / d logprob of `policy_loss`, of the shape of `logprob`."""
    advantage = terms.advantage
    old = logprob if terms.old_logprob is None else terms.old_logprob
    log_ratio = logprob - old
    ratio = log_ratio.clamp(-LIMIT, LIMIT).exp()
    _, rests = _clip(ratio, terms)
    rests |= log_ratio.abs() > LIMIT
    if terms.dual_clip is not None:
        rests |= (advantage < 0) & (ratio > terms.dual_clip)
    slope = torch.where(rests, 0.0, -ratio * advantage)
    importance = _importance(old, terms)
    if importance is not None:
        slope = slope * importance
    if terms.kl_coef and terms.ref_logprob is not None:
        log_ref = terms.ref_logprob - logprob
        k3_slope = torch.where(log_ref.abs() > LIMIT, 0.0, 1 - log_ref.exp())
        slope = slope + terms.kl_coef * k3_slope
    return slope * terms.weight


def _limited(x: Tensor) -> Tensor:
    """x clamped to +-LIMIT; the gradient at a bound is whole, where torch 2.14's clamp has none."""
    return torch.where(x.abs() > LIMIT, x.detach().clamp(-LIMIT, LIMIT), x)


def _clip(ratio: Tensor, terms: PolicyTerms) -> tuple[Tensor, Tensor]:
    """The bound that would clip each ratio, by its advantage's sign, and whether it does.

    Comparisons that NaN fails leave it in the loss and in the slope.
    """
    falls = terms.advantage < 0
    bound = torch.full_like(ratio, 1 + terms.clip_high).masked_fill(falls, 1 - terms.clip_low)
    return bound, torch.where(falls, ratio < bound, ratio > bound)


def _importance(old: Tensor, terms: PolicyTerms) -> Tensor | None:
    if terms.rollout_logprob is None:
        return None
    return (old.detach() - terms.rollout_logprob).exp().clamp(max=terms.tis_cap)
