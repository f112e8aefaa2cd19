"""Which engine samples a run's completions: the one asked for, or the faster of the two.

`rollout.engine = "auto"` samples completions of the first step's prompts by both engines, in turns,
and takes the faster one: by the median of `ROUNDS`, on the slowest process. The trial's completions
end after `rollout.trial_tokens`. A small number makes the trial short, but then no completion is
much longer than the others, where continuous batching gains most; the rollouts' own limit is exact.
The choice is written to the run's folder, and a resumed run reads it there: another engine would
change the last digits.

Continuous batching must first show that it computes the model that is trained: the log-probs of
what it sampled are compared with the learner's own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oisd.batch import Batch, assemble
from oisd.config import ConfigError, RolloutConfig
from oisd.policy import Policy
from oisd.run.processes import Processes

ROUNDS = 3
# Mean |log-prob - the learner's| of a token that rounding explains; that of `generate` is similar.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a run and why it was taken.

    seconds: the median time of the trial by engine; empty without one.
    disagreement: the mean |log-prob - the learner's| of its tokens, in nats.
    """

    engine: str
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    disagreement: dict[str, float] = field(default_factory=dict)
    completions: int = 0
    tokens: int = 0
    device: str = ""

    def write(self, file: Path) -> None:
        """As JSON, for people and for a resumed run."""
        file.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def read(file: Path) -> EngineChoice | None:
        """What `write` wrote; None if the file is missing or incomplete."""
        try:
            return EngineChoice(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def choose_engine(
    policy: Policy,
    logprobs: Callable[[Batch], Tensor],
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    processes: Processes,
) -> EngineChoice:
    """The engine that `config.engine` asks for, "continuous" or "auto", after a trial.

    Args:
        logprobs: [B, T] of a batch under the learner.
        prompts: of this process, repeated for their completions; may be empty.

    The same on all processes. Raises ConfigError if "continuous" was asked for and does not work.
    """
    auto = config.engine == "auto"
    limit = min(config.max_completion_tokens, config.trial_tokens)
    prompts = prompts[: 2 * config.batch_size]
    own: dict[str, Any] = {"seconds": {}, "disagreement": {}, "error": None}
    if prompts:
        options = {
            "max_completion_tokens": limit,
            "temperature": config.temperature,
            "batch_size": config.batch_size,
        }
        try:
            own |= _trial(policy, logprobs, prompts, options, auto)
        except (ValueError, RuntimeError, MemoryError) as error:
            own["error"] = str(error) or type(error).__name__
    found = processes.gather(own)
    errors = [theirs["error"] for theirs in found if theirs["error"]]
    # By engine, of the slowest process and of the one furthest off.
    seconds, disagreement = (
        {
            name: max(values[name] for values in each if name in values)
            for name in sorted(set().union(*each))
        }
        for each in ([theirs[what] for theirs in found] for what in ("seconds", "disagreement"))
    )
    engine, reason = "continuous", "asked for"
    bound = TOLERANCE.get(policy.dtype, TOLERANCE[torch.bfloat16])
    off = disagreement.get("continuous", 0.0)
    obstacle = errors[0] if errors else None
    if obstacle is None and not off <= bound:
        obstacle = (
            f"its log-probs are {off:.2g} nats a token from the learner's, and rounding explains "
            f"{bound:.2g}"
        )
    if obstacle is not None:
        if not auto:
            raise ConfigError(
                f'rollout.engine = "continuous" does not work here: {obstacle}; use "generate"'
            )
        engine, reason = "generate", f"continuous batching does not work: {obstacle}"
    elif auto:
        engine = min(seconds, key=lambda name: seconds[name], default="generate")
        reason = "the faster one in the trial"
    return EngineChoice(
        engine, reason, seconds, disagreement, len(prompts), limit, _name(processes.device)
    )


def _trial(
    policy: Policy,
    logprobs: Callable[[Batch], Tensor],
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    timed: bool,
) -> dict[str, Any]:
    rows, no_advantages = range(len(prompts)), torch.zeros(len(prompts))
    engines = ("generate", "continuous") if timed else ("continuous",)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    disagreement = {}
    # The first round is not timed: it compiles and allocates.
    for number in range(1 + ROUNDS * timed):
        for name in engines:
            _wait()
            start = time.perf_counter()
            sampled = policy.sample(prompts, rows, engine=name, **options)
            _wait()
            if number > 0:
                spent[name].append(time.perf_counter() - start)
            else:
                batch = assemble(prompts, sampled, no_advantages, rows, policy.pad_token_id)
                difference = (batch.rollout_logprobs - logprobs(batch)).abs()
                disagreement[name] = difference[batch.predicts].mean().item()
    seconds = {name: statistics.median(times) for name, times in spent.items() if times}
    return {"seconds": seconds, "disagreement": disagreement}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
