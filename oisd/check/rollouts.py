"""Rows about a handful of completions: the sampler against the update, and what they earn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oisd.batch import assemble
from oisd.check.findings import Finding
from oisd.config import AlignmentConfig, TrainConfig
from oisd.data import Example
from oisd.objective import Objective
from oisd.policy import Policy, Sampler
from oisd.rewards import RewardFunction
from oisd.rollout import ENGINES, Completions
from oisd.run.alarms import GAP
from oisd.run.engine_choice import TOLERANCE
from oisd.schema import one_line

_PART = "rollout"


@dataclass(frozen=True)
class Sampled:
    """Completions of a few prompts, one group of `size` after another."""

    prompts: list[list[int]]
    completions: Completions
    size: int


def sampling_rows(
    policy: Policy,
    config: TrainConfig,
    prompts: Sequence[Sequence[int]],
    size: int,
    most: int,
    found: list[Sampled],
) -> Iterator[Finding]:
    """Sample with the run's engine, and compare its log-probs with the update's own.

    size: completions of each prompt. most: tokens of a completion. found: gets what was sampled.
    """
    engines = ENGINES if config.rollout.engine == "auto" else (config.rollout.engine,)
    repeated = [[*prompt] for prompt in prompts for _ in range(size)]
    rows = range(len(repeated))
    off = replace(config, oisd=AlignmentConfig(think_weight=0.0, attention_weight=0.0))
    objective = Objective(policy, off)
    short = replace(config.rollout, max_completion_tokens=most)
    results: dict[str, Completions | Exception] = {}
    with Sampler(policy).ready() as ready:
        for engine in engines:
            options: Any = {"seed": config.run.seed, "engine": engine}
            try:
                results[engine] = ready.roll_out(repeated, rows, short, **options)
            except (ValueError, RuntimeError) as error:
                results[engine] = error
    for engine, made in results.items():
        if isinstance(made, Exception):
            asked = config.rollout.engine == engine
            remedy = 'set rollout.engine = "generate"' if asked else ""
            status = "fail" if asked else "warn"
            yield Finding(_PART, f"sampler {engine}", status, one_line(made), remedy=remedy)
            continue
        found.append(Sampled(repeated, made, size))
        nothing = torch.zeros(len(repeated))
        batch = assemble(repeated, made, nothing, rows, policy.pad_token_id)
        apart = (batch.rollout_logprobs - objective.logprobs(batch)).abs()[batch.predicts]
        yield _apart_row(policy, config, engine, apart)


def _apart_row(policy: Policy, config: TrainConfig, engine: str, apart: torch.Tensor) -> Finding:
    name = f"sampler {engine}"
    mean, most = apart.mean().item(), apart.max().item()
    bound = TOLERANCE.get(policy.dtype, GAP)
    words = f"log-probs of {len(apart)} tokens: {mean:.2g} nats from the update's on average"
    found = f"{words}, {most:.2g} at most, in {config.model.dtype}"
    if config.rollout.top_p < 1:
        found += "; a nucleus (rollout.top_p) renormalises the sampler's, the update's has all"
        return Finding(_PART, name, "warn", found, mean, bound, "set rollout.top_p = 1")
    if mean <= bound:
        return Finding(_PART, name, "pass", found, mean, bound)
    status = "fail" if mean > GAP or mean != mean else "warn"
    remedy = "run in float32, with another engine (rollout.engine), or with grpo.tis_cap"
    return Finding(_PART, name, status, found, mean, bound, remedy)


def reward_rows(
    policy: Policy,
    config: TrainConfig,
    reward: RewardFunction,
    examples: Sequence[Example],
    sampled: Sampled,
) -> Iterator[Finding]:
    """What the completions earn; examples: one for each group."""
    texts = policy.decode(sampled.completions)
    answers = [example.answer for example in examples for _ in range(sampled.size)]
    before = reward.timeouts
    rewards = torch.tensor(reward(texts, answers)).view(-1, sampled.size)
    late = reward.timeouts - before
    cut = 1 - sampled.completions.finished.float().mean().item()
    most = sampled.completions.ids.shape[1]
    short = most < config.rollout.max_completion_tokens
    found = f"{rewards.mean():.2f} on average over {rewards.numel()} completions"
    if cut:
        found += f", {cut:.0%} cut off after {most} tokens"
    if short and cut > 0.5:
        reason = f"{found}: too short to judge; raise --completion-tokens"
        yield Finding(_PART, "reward", "not checked", reason, rewards.mean().item())
    else:
        flat = bool((rewards == rewards[0, 0]).all())
        remedy = "easier problems, another system prompt, or a warm-up" if flat else ""
        status = "warn" if flat else "pass"
        yield Finding(_PART, "reward", status, found, rewards.mean().item(), remedy=remedy)
        same = int((rewards == rewards[:, :1]).all(dim=1).sum())
        words = f"{same} of {len(rewards)} groups have no variance, and so no gradient"
        all_same = same == len(rewards)
        remedy = "problems that the model solves sometimes, or more completions per prompt"
        yield Finding(
            _PART, "groups", "warn" if all_same else "pass", words, same, len(rewards) - 1,
            remedy if all_same else "",
        )  # fmt: skip
    words = f"{late} of {rewards.numel()} gradings took longer than {config.reward.timeout:g} s"
    remedy = "raise reward.timeout" if late else ""
    yield Finding(_PART, "time-outs", "warn" if late else "pass", words, late, 0, remedy)
