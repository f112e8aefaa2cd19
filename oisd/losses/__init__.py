"""The losses of OISD as pure functions: tensors and a configuration in, (loss, metrics) out.

    L = L_GRPO + think_weight * mean_g L_think + attention_weight * mean_g L_attn          (eq. 11)

Each loss is a sum over tokens, each token with a weight that `token_weights` makes:

    token-mean     1 / (tokens of the batch)
    sequence-mean  1 / (sequences * tokens of the sequence): the mean over a rollout's tokens, then
                   over the rollouts, as eq. 7, 10 and 11 take the alignment losses
    dr-grpo        1 / (sequences * max_tokens): no division by a rollout's own length

The caller, who knows the whole batch, gives the denominators. The losses of its micro-batches, and
of the processes that share it, therefore add up to the loss of the batch, and the gradient does not
depend on the split. Metrics are `Mean`s, which add up in the same way.

Shape letters: B sequences, T tokens, S student layers, N rows (tokens laid flat), D width,
V vocabulary, H heads, J key/value heads, K head dimension, M sampled keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from oisd.config import AUTO_TIS_CAP, AlignmentConfig, GRPOConfig
from oisd.losses.advantages import clip_advantages, frac_zero_std, group_advantages
from oisd.losses.attention import attention_loss, sampled_keys, sampled_steps
from oisd.losses.metrics import Largest, Mean, Metrics, add_metrics, means_by_sign
from oisd_kernels import LensStats, PolicyTerms, logit_lens_divergence, policy_head
from oisd_kernels.lens.policy_loss import PolicyLoss, policy_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "JointLosses", "Largest", "Mean", "Metrics", "add_metrics", "attention_loss", "clip_advantages",
    "frac_zero_std", "group_advantages", "grpo_and_think_loss", "grpo_loss", "policy_terms",
    "sampled_keys", "sampled_steps", "think_loss", "token_weights",
]  # fmt: skip


def token_weights(
    mask: Tensor,
    aggregation: Literal["token-mean", "sequence-mean", "dr-grpo"] = "token-mean",
    *,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """The weight of each token in a loss that is a sum over tokens.

    Args:
        mask: [B, T] bool, true where a token counts.
        aggregation: see the head of this module.
        num_sequences, num_tokens: those of the whole batch, where `mask` is only a part of it;
            by default those of `mask`.
        max_tokens: for "dr-grpo", the longest completion that the rollout allows.

    Returns [B, T] float32, 0 where the mask is false.
    """
    num_sequences = mask.shape[0] if num_sequences is None else num_sequences
    weights = mask.float()
    if aggregation == "token-mean":
        total = mask.sum() if num_tokens is None else num_tokens
        return weights / max(int(total), 1)
    if aggregation == "sequence-mean":
        return weights / (mask.sum(dim=1, keepdim=True).clamp(min=1) * max(num_sequences, 1))
    if aggregation == "dr-grpo":
        if max_tokens is None:
            raise ValueError(
                "token_weights: max_tokens is required by aggregation 'dr-grpo', got None; pass "
                "the rollout's max_completion_tokens"
            )
        return weights / (max(num_sequences, 1) * max_tokens)
    raise ValueError(
        "token_weights: aggregation must be 'token-mean', 'sequence-mean' or 'dr-grpo', "
        f"got {aggregation!r}"
    )


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: GRPOConfig | None = None,
    *,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weight: Tensor | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped policy loss of GRPO over the completions' tokens.

    Args:
        logprobs: [B, T] of the sampled tokens under the policy, with gradient.
        advantages: [B], one for each completion.
        mask: [B, T] bool, true at the completion's tokens. Other entries may hold anything.
        config: clip range, dual clip (arXiv 1912.09729), KL coefficient, aggregation.
        old_logprobs: [B, T] under the policy as it was before this batch's first optimizer step;
            by default `logprobs` itself, detached (strictly on-policy).
        rollout_logprobs: [B, T] as the sampling engine had them; needed with a number for
            `config.tis_cap`. Each token is weighted by min(exp(old - rollout), tis_cap); "auto" is
            2 where they are given.
        ref_logprobs: [B, T] under the reference model; needed with `config.kl_coef`.
        token_weight: [B, T], from `token_weights`; by default of this mask alone.
        max_tokens: for aggregation "dr-grpo" without `token_weight`.

    Returns the loss (scalar) and the metrics clip_frac/low, clip_frac/high, clip_frac/dual,
    kl/old, and kl/ref, tis/weight and tis/truncated where they apply; with `rollout_logprobs` also
    kl/sampler and kl/sampler_max, the mean and the largest of exp(d) - 1 - d with d = old - rollout
    over the tokens, whose expectation is KL(sampler || policy), and sampler_gap, the mean |d|.
    Raises ValueError for shapes that do not fit and for log-probs that the configuration needs.
    """
    config = config or GRPOConfig()
    given = {"mask": mask, "old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs}
    given |= {"ref_logprobs": ref_logprobs, "token_weight": token_weight}
    _require_shape("grpo_loss", "logprobs", logprobs, given)
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"grpo_loss: advantages must be [B] = [{logprobs.shape[0]}], "
            f"got {list(advantages.shape)}"
        )
    if token_weight is None:
        token_weight = token_weights(mask, config.aggregation, max_tokens=max_tokens)

    # Padding may hold anything, even infinities. It is replaced before the exponentials, because
    # 0 * inf in the backward is not 0. No exponential is taken in half precision.
    def masked(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return torch.where(mask, x, 0.0).to(torch.promote_types(x.dtype, torch.float32))

    terms = policy_terms(
        advantages.to(logprobs.dtype)[:, None].expand_as(logprobs),
        token_weight,
        config,
        old_logprobs=masked(old_logprobs),
        rollout_logprobs=masked(rollout_logprobs),
        ref_logprobs=masked(ref_logprobs),
    )
    found = policy_loss(torch.where(mask, logprobs, 0.0), terms)
    metrics = _policy_metrics(found, terms, mask)
    if rollout_logprobs is not None:
        old = logprobs if old_logprobs is None else old_logprobs
        metrics |= _sampler_metrics(old, rollout_logprobs, mask)
    return found.loss.sum(), metrics


def _require_shape(loss: str, name: str, like: Tensor, given: Mapping[str, Tensor | None]) -> None:
    for other, x in given.items():
        if x is not None and x.shape != like.shape:
            raise ValueError(
                f"{loss}: {other} must have the shape of {name} {list(like.shape)}, "
                f"got {list(x.shape)}"
            )


def policy_terms(
    advantages: Tensor,
    token_weight: Tensor,
    config: GRPOConfig,
    *,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> PolicyTerms:
    """The configuration and the batch as `oisd_kernels.policy_head` takes them: all of one shape.

    Raises ValueError for log-probs that the configuration needs and that are missing.
    """
    if config.kl_coef and ref_logprobs is None:
        raise ValueError("grpo_loss: ref_logprobs is required with kl_coef > 0, got None")
    cap = config.tis_cap
    if cap == "auto":
        cap = None if rollout_logprobs is None else AUTO_TIS_CAP
    if cap is not None and rollout_logprobs is None:
        raise ValueError("grpo_loss: rollout_logprobs is required with tis_cap, got None")
    return PolicyTerms(
        advantages,
        token_weight,
        old_logprobs,
        None if cap is None else rollout_logprobs,
        ref_logprobs if config.kl_coef else None,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        tis_cap=cap or math.inf,
        kl_coef=config.kl_coef,
    )


def _policy_metrics(found: PolicyLoss, terms: PolicyTerms, mask: Tensor) -> Metrics:
    ratio, advantage = found.ratio, terms.advantage
    negative = (advantage < 0) & mask
    metrics = {
        "clip_frac/low": Mean.over((ratio < 1 - terms.clip_low) & negative, mask),
        "clip_frac/high": Mean.over((ratio > 1 + terms.clip_high) & (advantage > 0), mask),
        "kl/old": Mean.over(ratio - 1 - found.log_ratio, mask),
    }
    if terms.dual_clip is not None:
        metrics["clip_frac/dual"] = Mean.over(found.dual_clipped & mask, mask)
    if found.importance is not None:
        metrics["tis/weight"] = Mean.over(found.importance, mask)
        metrics["tis/truncated"] = Mean.over(found.importance >= terms.tis_cap, mask)
    if found.k3 is not None:
        metrics["kl/ref"] = Mean.over(found.k3, mask)
    return metrics


def _sampler_metrics(old: Tensor, rollout: Tensor, mask: Tensor) -> Metrics:
    """How far the sampler is from the policy: KL(sampler || policy) by the k3 estimate."""
    gap = old.detach() - rollout
    k3 = (gap.expm1() - gap).clamp(min=0)  # which rounding alone takes below 0
    return {
        "kl/sampler": Mean.over(k3, mask),
        "kl/sampler_max": Largest.over(k3, mask),
        "sampler_gap": Mean.over(gap.abs(), mask),
    }


def think_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    advantages: Tensor,
    config: AlignmentConfig | None = None,
    *,
    token_weight: Tensor,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    impl: str = "auto",
    tp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Metrics]:
    """Logit alignment, eq. 7: sum_n token_weight_n * Abar_n * JS(student_n, teacher_n).

    Args:
        student_hidden: [S, N, D], what the unembedding reads for each student layer.
        teacher_hidden: [N, D], what it reads for the final layer; never receives gradient.
        weight: [V, D], the unembedding; frozen in this loss.
        advantages: [N], the advantage of the sequence that each row belongs to.
        config: temperature, divergence, beta, clip.
        token_weight: [N], from `token_weights(mask, "sequence-mean")` for eq. 7 and 11.
        bias, logit_softcap: of the unembedding, where the model has them.
        impl, tp_group: of `oisd_kernels.logit_lens_divergence`.

    Returns the loss, a mean over the S layers, and the metrics js/think_pos, js/think_neg,
    entropy/student, entropy/teacher (nats) and agreement/top1, over the rows whose advantage is not
    0; the others are not computed.
    """
    config = config or AlignmentConfig()
    signed = clip_advantages(advantages, config).float() * token_weight
    rows, stats = logit_lens_divergence(
        student_hidden,
        teacher_hidden,
        weight,
        bias=bias,
        token_weight=signed,
        divergence=config.divergence,
        beta=config.beta,
        temperature=config.lens_temperature,
        logit_softcap=logit_softcap,
        return_stats=True,
        impl=impl,
        tp_group=tp_group,
    )
    return rows.sum() / student_hidden.shape[0], _think_metrics(stats, signed)


class JointLosses(NamedTuple):
    """What `grpo_and_think_loss` gives."""

    grpo: Tensor
    think: Tensor
    metrics: Metrics
    importance: Tensor | None  # [N], the weight of each token; None for none


def grpo_and_think_loss(
    final_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    advantages: Tensor,
    grpo: GRPOConfig | None = None,
    config: AlignmentConfig | None = None,
    *,
    grpo_weight: Tensor,
    think_weight: Tensor,
    think_advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    impl: str = "auto",
    tp_group: ProcessGroup | None = None,
) -> JointLosses:
    """`grpo_loss` and `think_loss` from one pass over the unembedding, over N rows (tokens).

    The final logits are computed once, and all gradients in the forward: 3 + 2S matmuls of 2*N*D*V
    with the unembedding's gradient, of which GRPO alone costs 3.

    If tokens have an importance weight, it multiplies the alignment's terms too, whose advantage is
    that of the sampled tokens. The paper, whose rollouts are on-policy, has no such weight.

    Args:
        final_hidden: [N, D], what it reads for the final layer. Gradient of GRPO alone.
        weight: [V, D], the unembedding. Gradient of GRPO alone.
        labels: [N] int64, the sampled tokens.
        student_hidden: [S, N, D], what it reads for each student layer; S may be 0.
        advantages: [N], of the sequence that each row belongs to.
        grpo, config: as `grpo_loss` and `think_loss` have them.
        grpo_weight: [N], from `token_weights` with the aggregation of GRPO.
        think_weight: [N], from `token_weights(mask, "sequence-mean")` for eq. 7 and 11.
        think_advantages: [N], of `think_loss`; by default `advantages`, which the method has.
        old_logprobs, rollout_logprobs, ref_logprobs: [N], as in `grpo_loss`.
        temperature: of the policy; that of the lens is in `config`.
        bias, logit_softcap: of the unembedding, where the model has them.
        impl, tp_group: of `oisd_kernels.policy_head`.

    Returns both losses, scalars, their metrics and entropy/policy (nats), and the weights.
    Raises ValueError as the two losses and `policy_head` do.
    """
    grpo, config = grpo or GRPOConfig(), config or AlignmentConfig()
    given: dict[str, Tensor | None] = {"advantages": advantages, "grpo_weight": grpo_weight}
    given |= {"think_weight": think_weight, "think_advantages": think_advantages}
    _require_shape("grpo_and_think_loss", "labels", labels, given)
    terms = policy_terms(
        advantages,
        grpo_weight,
        grpo,
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
    )
    aligned = advantages if think_advantages is None else think_advantages
    signed = clip_advantages(aligned, config).float() * think_weight
    head = policy_head(
        final_hidden,
        weight,
        labels,
        student_hidden,
        bias=bias,
        token_weight=signed,
        divergence=config.divergence,
        beta=config.beta,
        temperature=temperature,
        lens_temperature=config.lens_temperature,
        logit_softcap=logit_softcap,
        policy=terms,
        impl=impl,
        tp_group=tp_group,
    )
    found = policy_loss(head.logprob.detach(), terms.constants(head.logprob.dtype))
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    metrics = _policy_metrics(found, terms, everywhere)
    metrics["entropy/policy"] = Mean.over(head.entropy)
    if rollout_logprobs is not None:
        old = head.logprob.detach() if old_logprobs is None else old_logprobs
        metrics |= _sampler_metrics(old, rollout_logprobs, everywhere)
    if len(student_hidden) > 0:
        metrics |= _think_metrics(head.stats, signed)
    rows = head.divergence
    if found.importance is not None:
        # Known only after the pass; exact for the gradient of the hidden states.
        rows = rows * found.importance
    think = rows.sum() / max(len(student_hidden), 1)
    return JointLosses(head.policy_loss, think, metrics, found.importance)


def _think_metrics(stats: LensStats, signed: Tensor) -> Metrics:
    metrics = means_by_sign("js/think", stats.divergence, signed)
    live = (signed != 0).expand_as(stats.divergence)
    metrics["entropy/student"] = Mean.over(stats.student_entropy, live)
    metrics["entropy/teacher"] = Mean.over(stats.teacher_entropy, signed != 0)
    metrics["agreement/top1"] = Mean.over(stats.top1_agreement, live)
    return metrics
