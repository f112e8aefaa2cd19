"""Alarms: what the metrics of a run say has gone wrong, each once, with the setting to look at.

Pure and without torch: what is raised at a step depends on the rows of metrics up to it alone. A
resumed run reads its earlier rows again, and so raises each alarm at the same step, or no more.

A quantity that a step did not measure (no token had an advantage, say) neither raises an alarm nor
ends a streak. Entropies are compared as means, because those of single steps are noisy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oisd.config import TrainConfig
from oisd.weights import TERMS, factor_of, share_of, weight_of

EQUAL_STEPS = 10  # in a row, in which no group of completions has unlike rewards
CUT_OFF_STEPS = 3  # in a row, in which every completion is cut off
GAP = 0.05  # nats a token
ENTROPY_STEPS = 10  # that an entropy is averaged over, first and last
LOWEST_ENTROPY = 0.01  # nats
ENTROPY_GROWTH = 1.5  # times the first entropy
SHARE_ROWS = 3  # measurements that a share of the update is averaged over
LOWEST_SHARE = 0.01
USEFUL_SHARE = 0.1  # what the weight in the remedy gives, as `Settings.larger_weight` says
TIMEOUT_STEPS = 3  # in a row
NO_GOLD_STEPS = 5  # in a row, in which no completion has a gold answer
TIMEOUT_SHARE = 0.01  # of a step's completions


@dataclass(frozen=True)
class Reading:
    """What alarms look at in the metrics of one or more steps; None where it was not measured."""

    step: int  # the last of them, counted from 1
    reward: float | None = None  # mean
    equal: float | None = None  # share of groups whose rewards are all equal
    finished: float | None = None  # share of completions that were not cut off
    gap: float | None = None  # mean |log-prob of the update - of the sampler|, nats a token
    entropy: float | None = None  # of the policy, nats a token
    timeouts: float | None = None  # share of completions whose grading took too long
    gold: float | None = None  # share of completions that have a gold answer that can be read
    # By term of the alignment: the norm of its weighted gradient over that of GRPO's. Of a term
    # that is annealed: with the weight that it began with.
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What to look at after each alarm, in the words of the trainer in use."""

    equal: str
    finished: str
    gap: str
    entropy_low: str
    entropy_high: str
    timeouts: str
    weight: str  # what to look at; holds "{}" where the name of the term goes
    larger_weight: str  # what to do; holds "{0}" for the name of the term, "{1}" for the weight
    gold: str = ""


OURS = Settings(
    equal="look at reward.function, data.answer_field and the completions in the run's folder",
    finished="look at rollout.max_completion_tokens, and at whether the model ends its answers",
    gap="look at rollout.engine, model.dtype and grpo.tis_cap",
    entropy_low="look at optimizer.learning_rate, grpo.clip_high and how hard the problems are",
    entropy_high="look at optimizer.learning_rate, grpo.kl_coef and oisd.think_weight",
    timeouts="look at reward.timeout, and at the load of the machine",
    weight="look at oisd.{}_weight",
    larger_weight="raise oisd.{0}_weight to about {1} for 10 %, or set oisd.{0}_share",
)


class Alarms:
    """The alarms of a run.

    settings: what each names.
    weights: the constant weight of each term whose shares readings have.
    mean_too: rewards count as equal only if their mean stays the same as well, as where advantages
        compare more than a group.
    """

    def __init__(
        self, settings: Settings, weights: Mapping[str, float], mean_too: bool = False
    ) -> None:
        self.settings, self.weights, self.mean_too = settings, weights, mean_too
        self._raised: set[str] = set()
        self._streaks: dict[str, int] = defaultdict(int)
        self._entropies: list[float] = []
        self._shares: dict[str, list[float]] = defaultdict(list)
        self._step, self._reward = 0, None

    def new(self, seen: Reading) -> dict[str, str]:
        """The alarms that a reading raises for the first time: name and line of each.

        Readings must come in the order of their steps. One that covers several steps counts as that
        many.
        """
        steps, self._step = seen.step - self._step, seen.step
        found = {
            "rewards_equal": self._equal(seen, steps),
            "all_cut_off": self._cut_off(seen, steps),
            "sampler_gap": self._gap(seen),
            **self._entropy(seen, steps),
            **self._share(seen),
            "reward_timeouts": self._timeouts(seen, steps),
            "no_gold": self._no_gold(seen, steps),
        }
        fresh = {n: line for n, line in found.items() if line and n not in self._raised}
        self._raised.update(fresh)
        return fresh

    def _streak(self, name: str, holds: bool | None, steps: int) -> int:
        """How many steps in a row it has held; None for a reading that does not say."""
        if holds is not None:
            self._streaks[name] = self._streaks[name] + steps if holds else 0
        return self._streaks[name]

    def _equal(self, seen: Reading, steps: int) -> str:
        equal = None if seen.equal is None else seen.equal == 1.0
        if equal and self.mean_too and self._reward is not None and seen.reward != self._reward:
            self._streaks["equal"] = 0  # begins anew with this reading
        self._reward = seen.reward
        count = self._streak("equal", equal, steps)
        if count < EQUAL_STEPS or seen.reward is None:
            return ""
        return (
            f"the rewards of each prompt's completions have been equal for {count} steps (mean now "
            f"{seen.reward:.4f}), so that nothing is learned; {self.settings.equal}"
        )

    def _cut_off(self, seen: Reading, steps: int) -> str:
        none = None if seen.finished is None else seen.finished == 0.0
        count = self._streak("cut off", none, steps)
        if count < CUT_OFF_STEPS:
            return ""
        return f"every completion of {count} steps in a row was cut off; {self.settings.finished}"

    def _gap(self, seen: Reading) -> str:
        if seen.gap is None or seen.gap <= GAP:
            return ""
        return (
            f"the sampler's log-probabilities are {seen.gap:.3f} nats a token away from the "
            f"update's on average, more than {GAP}; {self.settings.gap}"
        )

    def _entropy(self, seen: Reading, steps: int) -> dict[str, str]:
        if seen.entropy is None:
            return {}
        self._entropies += [seen.entropy] * steps
        if len(self._entropies) < ENTROPY_STEPS:
            return {}
        first, last = (_mean(part) for part in self._first_and_last())
        found = {}
        if last < LOWEST_ENTROPY:
            found["entropy_low"] = (
                f"the policy's entropy has been {last:.4f} nats a token over {ENTROPY_STEPS} "
                f"steps, less than {LOWEST_ENTROPY}: it hardly explores; "
                f"{self.settings.entropy_low}"
            )
        if last > ENTROPY_GROWTH * first:
            found["entropy_high"] = (
                f"the policy's entropy has risen from {first:.4f} to {last:.4f} nats a token "
                f"(means of {ENTROPY_STEPS} steps), by more than half; {self.settings.entropy_high}"
            )
        return found

    def _first_and_last(self) -> tuple[list[float], list[float]]:
        """The entropies of the first steps and of the last; no others are kept."""
        self._entropies[ENTROPY_STEPS:-ENTROPY_STEPS] = []
        return self._entropies[:ENTROPY_STEPS], self._entropies[-ENTROPY_STEPS:]

    def _share(self, seen: Reading) -> dict[str, str]:
        found = {}
        for name, share in seen.shares.items():
            self._shares[name] = [*self._shares[name], share][-SHARE_ROWS:]
            mean = _mean(self._shares[name])
            if len(self._shares[name]) < SHARE_ROWS:
                continue
            if mean > 1:
                found[f"{name}_gradient"] = (
                    f"the {name} term's weighted gradient has {mean:.4g} times the norm of GRPO's "
                    f"(mean of the last {SHARE_ROWS} measured); {self.settings.weight.format(name)}"
                )
            if mean < LOWEST_SHARE:
                found[f"{name}_share"] = self._of_low_share(name, mean)
        return found

    def _of_low_share(self, name: str, share: float) -> str:
        if share == 0:
            look = self.settings.weight.format(name)
            return f"the {name} term has no gradient: no trained weight lies beneath it; {look}"
        wanted = float(f"{self.weights[name] * USEFUL_SHARE / share:.2g}")
        return (
            f"the {name} term is {100 * share:.2g} % of GRPO's gradient (mean of the last "
            f"{SHARE_ROWS} measured): it does nothing here; "
            f"{self.settings.larger_weight.format(name, f'{wanted:g}')}"
        )

    def _timeouts(self, seen: Reading, steps: int) -> str:
        many = None if seen.timeouts is None else seen.timeouts > TIMEOUT_SHARE
        count = self._streak("timeouts", many, steps)
        if count < TIMEOUT_STEPS or seen.timeouts is None:
            return ""
        return (
            f"grading took too long for {seen.timeouts:.1%} of the completions, more than "
            f"{TIMEOUT_SHARE:.0%} for {count} steps in a row; they earned 0; "
            f"{self.settings.timeouts}"
        )

    def _no_gold(self, seen: Reading, steps: int) -> str:
        none = None if seen.gold is None else seen.gold == 0.0
        count = self._streak("no gold", none, steps)
        if count < NO_GOLD_STEPS:
            return ""
        return (
            f"no completion of {count} steps in a row had a gold answer that can be read, so that "
            f"none was graded; {self.settings.gold}"
        )


class RunAlarms:
    """The alarms of `oisd train`, from the rows of metrics.jsonl.

    earlier: rows of a run that is resumed.
    """

    def __init__(self, config: TrainConfig, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._internal_steps = config.grpo.internal_steps
        align = config.oisd
        # A term that keeps the share which its user set is not told of it.
        self._terms = [term for term in TERMS if share_of(align, term) is None]
        weights = {term: weight_of(align, term) for term in self._terms}
        self._alarms = Alarms(OURS, weights, mean_too=config.grpo.advantage == "reinforce++")
        for row in earlier:
            self.new(row)

    def new(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
        """ "alarms", for a row of metrics, and the lines that it raises; {} for none."""
        if "reward" not in row:  # of an evaluation before the first step
            return {}
        lines = self._alarms.new(self._reading(row))
        return {"alarms": list(lines.values())} if lines else {}

    def _reading(self, row: Mapping[str, Any]) -> Reading:
        value = measured(row)
        shares = {term: value(f"share/{term}") for term in self._terms}
        factors = {t: factor_of(self._config, t, row["step"] - 1) for t in self._terms}
        # The first steps of BuPO train the policy of another layer than the one that samples.
        internal = row["step"] <= self._internal_steps
        return Reading(
            row["step"],
            reward=value("reward"),
            equal=value("frac_zero_std"),
            finished=value("frac_finished"),
            gap=value("sampler_gap"),
            entropy=None if internal else value("entropy/policy"),
            timeouts=value("frac_timeouts"),
            shares={t: share / factors[t] for t, share in shares.items() if share is not None},
        )


def measured(row: Mapping[str, Any]) -> Callable[[str], float | None]:
    """Reads a row by name: None for what is missing or not finite."""

    def value(name: str) -> float | None:
        found = row.get(name)
        return found if found is not None and math.isfinite(found) else None

    return value


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
