"""Advantages of completions against the others for their prompt (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import torch
from torch import Tensor

from oisd.config import AlignmentConfig
from oisd.metrics import Mean


def group_advantages(rewards: Tensor, group_size: int, *, scale_by_std: bool = True) -> Tensor:
    """GRPO's advantage of each completion against the others for its prompt.

    Args:
        rewards: [P * group_size], the completions of a prompt next to each other.
        group_size: completions per prompt, at least 2.
        scale_by_std: divide by the group's standard deviation (with Bessel's correction, as the
            reference implementations do); Dr. GRPO (arXiv 2503.20783) does not.

    Returns [P * group_size] float32; exactly 0 throughout a group whose rewards are all equal.
    Raises ValueError for a size that does not divide the number of rewards.
    """
    if group_size < 2 or rewards.dim() != 1 or rewards.numel() % group_size:
        raise ValueError(
            "group_advantages: group_size must be at least 2 and divide rewards [P * group_size], "
            f"got {group_size} for rewards of shape {list(rewards.shape)}"
        )
    groups = rewards.float().view(-1, group_size)
    # The mean of equal numbers may be off by a rounding, and the quotient by the deviation would
    # blow that up: equality is what decides.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-6)
    return advantages.masked_fill(equal, 0.0).flatten()


def frac_zero_std(rewards: Tensor, group_size: int) -> Mean:
    """Share of prompts whose completions all earned the same, and so teach nothing."""
    groups = rewards.view(-1, group_size)
    equal = (groups == groups[:, :1]).all(dim=1)
    return Mean.over(equal, torch.ones_like(equal))


def clip_advantages(advantages: Tensor, config: AlignmentConfig) -> Tensor:
    """Abar = clip(A, -c, c), the signed weight of both alignment losses."""
    if config.advantage_clip is None:
        return advantages
    return advantages.clamp(-config.advantage_clip, config.advantage_clip)
