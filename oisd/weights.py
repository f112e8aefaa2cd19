"""The weight of each loss in the update: constant, annealed, or one that keeps a share of it.

    L = L_GRPO + w_think L_think + w_attention L_attn                                     (eq. 11)

The share of a term is the norm of its weighted gradient over the norm of GRPO's,

    share = w |g_term| / |g_GRPO|,

both over the whole minibatch and all processes, before clipping. With r = |g_term| / |g_GRPO|, the
weight at a step counted from 0, with f the factor of the term's schedule, is

    w = weight * f                  weight: oisd.think_weight or oisd.attention_weight
    w = share * f / exp(m)          share: oisd.think_share or oisd.attention_share, if set

    m <- m + max(1/k, 1/5) (log r - m)              at the k-th measurement, in later steps' weights

so that m is the mean log ratio of the first five measurements, then an exponential moving average.
Before the first measurement the term has its weight of the first line; until there is one, each
step tries to measure.

Pure and without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from oisd.config import AlignmentConfig, TrainConfig

TERMS = ("think", "attention")
_LEAST_RATE = 1 / 5  # of the moving average


def schedule_factor(
    schedule: Literal["constant", "linear", "cosine"], step: int, steps: int
) -> float:
    """What a schedule multiplies a weight by: from 1 at step 0 toward 0 at `steps`.

        constant  1
        linear    1 - step / steps
        cosine    (1 + cos(pi step / steps)) / 2

    step: counted from 0, below `steps`.
    """
    if schedule == "linear":
        return 1 - step / steps
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    return 1.0


def weight_of(align: AlignmentConfig, term: str) -> float:
    """The constant weight of a term, "think" or "attention"; 0 if it is off."""
    return getattr(align, f"{term}_weight")


def share_of(align: AlignmentConfig, term: str) -> float | None:
    """The share that a term is to keep; None for a weight that does not follow its gradient."""
    return getattr(align, f"{term}_share")


def factor_of(config: TrainConfig, term: str, step: int) -> float:
    """The factor of a term's schedule at a step counted from 0."""
    schedule = getattr(config.oisd, f"{term}_schedule")
    return schedule_factor(schedule, step, max(config.run.steps, 1))


class Weights:
    """The weights of a run's losses, step by step; all processes have the same."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.terms = [term for term in TERMS if weight_of(config.oisd, term)]
        # By term: the number of measurements, and the smoothed log of |g_term| / |g_GRPO|.
        self._measured: dict[str, tuple[int, float]] = {}

    @property
    def names(self) -> list[str]:
        """The losses that are computed."""
        return ["grpo", *self.terms]

    def at(self, step: int) -> dict[str, float]:
        """The weight of each loss at a step, counted from 0."""
        return {"grpo": 1.0} | {term: self._at(term, step) for term in self.terms}

    def _at(self, term: str, step: int) -> float:
        align, factor = self._config.oisd, factor_of(self._config, term, step)
        share = share_of(align, term)
        if share is None or term not in self._measured:
            return weight_of(align, term) * factor
        return share * factor / math.exp(self._measured[term][1])

    def are_measured(self, step: int) -> bool:
        """Whether a step measures the shares."""
        align = self._config.oisd
        if not self.terms or not align.share_every:
            return False
        followed = [term for term in self.terms if share_of(align, term) is not None]
        return step % align.share_every == 0 or any(t not in self._measured for t in followed)

    def observe(self, norms: Mapping[str, float], step: int) -> dict[str, float]:
        """Take a measurement into the weights of later steps; returns share/<term> of each term.

        norms: the norm of each loss's gradient, unweighted, by name, "grpo" among them. Where that
            of GRPO is 0 there is no share: returns {}.
        """
        shares = {}
        weights = self.at(step)
        for term in self.terms if norms["grpo"] > 0 else ():
            ratio = norms[term] / norms["grpo"]
            shares[f"share/{term}"] = weights[term] * ratio
            # A term of gradient 0, whose adapters lie above it, say, has no weight to follow.
            if share_of(self._config.oisd, term) is not None and ratio > 0:
                count, mean = self._measured.get(term, (0, 0.0))
                rate = max(1 / (count + 1), _LEAST_RATE)
                self._measured[term] = count + 1, mean + rate * (math.log(ratio) - mean)
        return shares

    def metrics(self, step: int) -> dict[str, float]:
        """weight/<term> of each weight that is not constant."""
        align = self._config.oisd
        return {
            f"weight/{term}": self._at(term, step)
            for term in self.terms
            if share_of(align, term) is not None or getattr(align, f"{term}_schedule") != "constant"
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return dict(self._measured)

    def load_state_dict(self, state: Mapping[str, tuple[int, float]]) -> None:
        """Continue from a checkpoint."""
        self._measured = {term: (int(count), float(mean)) for term, (count, mean) in state.items()}
