"""The policy before the first step, frozen: what the KL term compares the trained one with."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from oisd import adapters
from oisd.batch import Batch
from oisd.config import AlignmentConfig
from oisd.objective import Objective
from oisd.policy import load_policy


class ReferencePolicy:
    """A frozen copy of the initial model, or the trained one without its adapters.

    trained: of the policy that is trained.
    saved: folder of the initial model, unless there are adapters.
    split: whether the processes share this model too.
    """

    def __init__(self, trained: Objective, saved: Path, *, split: bool) -> None:
        self._trained, config = trained, trained.config
        if config.model.lora_rank:
            self._objective = trained
            return
        policy = load_policy(
            replace(config.model, gradient_checkpointing=False),
            seed=config.run.seed,
            device=trained.policy.device,
            checkpoint=saved,
        )
        policy.model.requires_grad_(False).eval()
        off = AlignmentConfig(think_weight=0.0, attention_weight=0.0)
        self._objective = Objective(policy, replace(config, oisd=off))
        if split:
            self._objective.split()

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] log-probs of the completions; 0 where nothing is predicted."""
        own = self._objective is self._trained
        with adapters.disabled(self._trained.policy.model) if own else nullcontext():
            return self._objective.logprobs(batch)
