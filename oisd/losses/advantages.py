"""Advantages of completions: GRPO's (arXiv 2402.03300), RLOO's, Reinforce++'s."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oisd.config import AlignmentConfig, GRPOConfig
from oisd.losses.metrics import Mean


def completion_advantages(
    rewards: Tensor,
    lengths: Tensor,
    shares: Sequence[tuple[Tensor, Tensor]],
    config: GRPOConfig,
    group_size: int,
) -> Tensor:
    """The advantages that `config.advantage` asks for, of one process's completions.

    Args:
        rewards: [P * group_size], the completions of a prompt next to each other.
        lengths: [P * group_size], tokens of each completion.
        shares: rewards and lengths of each process; Reinforce++ compares with all of them.
        group_size: completions per prompt, at least 2.

    Returns [P * group_size] float32.
    """
    if config.advantage == "rloo":
        return rloo_advantages(rewards, group_size)
    if config.advantage == "reinforce++":
        everything, tokens = (torch.cat(parts) for parts in zip(*shares, strict=True))
        return batch_advantages(rewards, lengths, (everything, tokens))
    return group_advantages(rewards, group_size, scale_by_std=config.scale_by_std)


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
    # The mean of equal numbers may be off by a rounding error, which division by the deviation
    # would enlarge. Hence the test for equality.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-6)
    return advantages.masked_fill(equal, 0.0).flatten()


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO's (arXiv 2402.14740): the reward less the mean of the *other* completions' rewards.

    G / (G - 1) times `group_advantages` without the standard deviation, whose arguments, result
    and errors it has.
    """
    advantages = group_advantages(rewards, group_size, scale_by_std=False)
    return advantages * (group_size / (group_size - 1))


def batch_advantages(
    rewards: Tensor, lengths: Tensor, batch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Reinforce++'s (arXiv 2501.03262) for a reward at the end of a completion, undiscounted.

    The reward is the return of each of the completion's tokens. Its mean over all tokens of the
    batch is subtracted, and it is divided by its standard deviation there (with Bessel's
    correction). Groups play no part.

    Args:
        rewards: [B].
        lengths: [B], tokens of each completion.
        batch: rewards and lengths of the whole batch, if the others are one process's.

    Returns [B] float32; exactly 0 where all rewards of the batch are equal.
    """
    everything, tokens = (rewards, lengths) if batch is None else batch
    everything, tokens = everything.double(), tokens.double()
    total = tokens.sum()
    if total == 0 or bool((everything == everything[0]).all()):
        return torch.zeros_like(rewards, dtype=torch.float32)
    mean = (tokens * everything).sum() / total
    variance = (tokens * (everything - mean) ** 2).sum() / (total - 1).clamp_min(1)
    return ((rewards.double() - mean) * (variance + 1e-8).rsqrt()).float()


def frac_zero_std(rewards: Tensor, group_size: int) -> Mean:
    """Share of prompts whose completions all earned the same: they have no gradient."""
    groups = rewards.view(-1, group_size)
    return Mean.over((groups == groups[:, :1]).all(dim=1))


def shuffled_advantages(
    rows: Tensor, shares: Sequence[tuple[Tensor, Tensor]], seed: int, step: int
) -> Tensor:
    """For each of one process's completions the advantage of another one of the step.

    A control for studies, not the method: the alignment losses keep their size and lose what the
    reward says. One permutation over the completions of all processes, a function of seed and step;
    it may leave some in their places.

    Args:
        rows: [B] int64, the number of each completion within the step.
        shares: of each process the numbers of its completions and their advantages.
        seed, step: of the run; at least 0.

    Returns [B], on the device of the advantages.
    """
    numbers, advantages = (torch.cat(parts) for parts in zip(*shares, strict=True))
    by_number = torch.zeros_like(advantages)
    by_number[numbers] = advantages
    # A stream of its own: (seed, step) alone is that of the step's dropout.
    noise = torch.Generator().manual_seed((seed * 1_000_003 + step * 4099 + 2_000_029) % 2**63)
    permutation = torch.randperm(len(by_number), generator=noise).to(rows.device)
    return by_number[permutation[rows]]


def clip_advantages(advantages: Tensor, config: AlignmentConfig) -> Tensor:
    """Abar = clip(A, -c, c), the signed weight of both alignment losses.

    Of |A| if `config.advantage` is "absolute". If it is "shuffled", the advantages given are those
    already (see `shuffled_advantages`).
    """
    if config.advantage == "absolute":
        advantages = advantages.abs()
    if config.advantage_clip is None:
        return advantages
    return advantages.clamp(-config.advantage_clip, config.advantage_clip)
