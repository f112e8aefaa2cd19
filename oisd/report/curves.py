"""Curves of metrics over the steps: means over the runs of a group, smoothed, and thinned out.

A chart shows a metric of each group, or, of one group alone, all metrics of a panel. Beside it
stands a table of the same numbers, which are not smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oisd.plots import smooth
from oisd.report.runs import Group

# A curve in a page is about so many pixels wide; more points than that cannot be told apart.
BUCKETS = 240
# Points above which a line is a moving average.
SMOOTH_ABOVE = 30
_TABLE_ROWS = 9


@dataclass(frozen=True)
class Curve:
    """A metric over the steps: all arrays are [points], in the order of the steps."""

    label: str
    steps: np.ndarray
    mean: np.ndarray
    """Over the runs that have the step."""
    low: np.ndarray
    high: np.ndarray
    """The smallest and largest value among the runs."""
    line: np.ndarray
    """The mean, as a moving average where there are many points."""
    runs: int
    place: int
    """Of the group, or of the metric in its panel: the same number, the same look."""

    @property
    def is_smoothed(self) -> bool:
        return len(self.steps) > SMOOTH_ABOVE

    def thinned(self) -> Curve:
        """At most `BUCKETS` points: means of the line, and the extremes of each bucket."""
        if len(self.steps) <= BUCKETS:
            return self
        first, last = self.steps[0], self.steps[-1]
        place = ((self.steps - first) * BUCKETS // (last - first + 1)).astype(int)
        _, starts, counts = np.unique(place, return_index=True, return_counts=True)

        def means(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, starts) / counts

        return Curve(
            self.label,
            means(self.steps.astype(float)),
            means(self.mean),
            np.minimum.reduceat(self.low, starts),
            np.maximum.reduceat(self.high, starts),
            means(self.line),
            self.runs,
            self.place,
        )


def curve_of(group: Group, metric: str, label: str, place: int) -> Curve | None:
    """The curve of a metric of a group; None where no run has a finite value of it.

    Steps whose rewards are equal in each group have gradient 0, which says nothing of its norm:
    they are left out.
    """
    found = [run.values(metric) for run in group.runs]
    if metric.startswith(("grad_norm", "share/")):
        found = [{step: v for step, v in values.items() if v} for values in found]
    found = [values for values in found if values]
    steps = sorted({step for values in found for step in values})
    if not steps:
        return None
    columns = [[values[step] for values in found if step in values] for step in steps]
    mean = np.array([sum(column) / len(column) for column in columns])
    line = np.asarray(smooth(mean.tolist())) if len(steps) > SMOOTH_ABOVE else mean
    return Curve(
        label,
        np.array(steps),
        mean,
        np.array([min(column) for column in columns]),
        np.array([max(column) for column in columns]),
        line,
        len(found),
        place,
    )


@dataclass(frozen=True)
class Chart:
    """What is drawn in one pair of axes."""

    name: str
    """Unique in a page, of letters, digits and dashes."""
    title: str
    unit: str
    curves: list[Curve]
    limits: tuple[float, float] | None = None
    """Of the vertical axis, where several charts share it."""
    logarithmic: bool = False
    ceiling: float | None = None
    """A value to mark, if it is in view."""
    is_of_groups: bool = False
    """Whether its curves are groups, of which one may be alone in it."""

    @property
    def thinned_from(self) -> int:
        """The points of the longest curve, if it is thinned out; else 0."""
        longest = max(len(curve.steps) for curve in self.curves)
        return longest if longest > BUCKETS else 0

    @property
    def words(self) -> str:
        """What the chart shows, for those who cannot see it."""
        parts = []
        for curve in self.curves:
            first, last = curve.mean[0], curve.mean[-1]
            parts.append(
                f"{curve.label}: {number(first)} at step {curve.steps[0]:.0f}, {number(last)} at "
                f"step {curve.steps[-1]:.0f}, between {number(curve.low.min())} and "
                f"{number(curve.high.max())}."
            )
        return f"{self.title} ({self.unit}) over the training steps. {' '.join(parts)}"

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: some steps, evenly spread, with the mean and range of each curve."""
        steps = sorted({int(step) for curve in self.curves for step in curve.steps})
        chosen = np.unique(np.linspace(0, len(steps) - 1, _TABLE_ROWS).round().astype(int))
        rows = []
        for step in (steps[place] for place in chosen):
            cells = [str(step)]
            for curve in self.curves:
                at = np.flatnonzero(curve.steps == step)
                cells.append(_cell(curve, int(at[0])) if len(at) else "")
            rows.append(cells)
        return ["step", *(curve.label for curve in self.curves)], rows


def _cell(curve: Curve, at: int) -> str:
    if curve.runs == 1:
        return number(curve.mean[at])
    low, high = number(curve.low[at]), number(curve.high[at])
    return f"{number(curve.mean[at])} [{low}, {high}]"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    """Metric and label; a metric that ends in * stands for all that begin so."""
    shares_limits: bool = False
    logarithmic: bool = False
    ceiling: float | None = None
    of_single: bool = False
    """Left out where groups are compared."""


_SECTIONS: tuple[tuple[str, tuple[_Panel, ...]], ...] = (
    ("Reward and accuracy", (
        _Panel("reward", "Reward", "mean of a step", (("reward", "training"),)),
        _Panel("avg", "Avg@K", "share right, evaluation", (("eval/avg_at_k", "evaluation"),)),
        _Panel("pass", "Pass@K", "share solved, evaluation", (("eval/pass_at_*", "K = "),)),
    )),
    ("Alignment", (
        _Panel("js-think", "Divergence of predictions", "nats",
               (("js/think_pos", "advantage > 0"), ("js/think_neg", "advantage < 0")),
               shares_limits=True, ceiling=math.log(2)),
        _Panel("js-attention", "Divergence of attention", "nats",
               (("js/attention_pos", "advantage > 0"), ("js/attention_neg", "advantage < 0")),
               shares_limits=True, ceiling=math.log(2)),
        _Panel("agreement", "Student and final layer agree", "share of tokens",
               (("agreement/top1", "same top token"),)),
    )),
    ("Entropy", (
        _Panel("entropy-policy", "Entropy of the policy", "nats a token",
               (("entropy/policy", "policy"),)),
        _Panel("entropy-student", "Entropy of the student layer's lens", "nats a token",
               (("entropy/student", "student layer"),)),
    )),
    ("Gradients and weights", (
        _Panel("grad-norm", "Gradient norm", "L2 norm before clipping",
               (("grad_norm", "total"), ("grad_norm/grpo", "GRPO"), ("grad_norm/think", "logit"),
                ("grad_norm/attention", "attention")), logarithmic=True),
        _Panel("share", "Share of the update", "gradient norm / GRPO's", (("share/*", ""),),
               logarithmic=True),
        _Panel("weight", "Weight of the alignment", "weight", (("weight/*", ""),)),
    )),
    ("Length and time", (
        _Panel("length", "Completion length", "tokens", (("completion_length", "training"),)),
        _Panel("finished", "Finished completions", "share", (("frac_finished", "training"),)),
        _Panel("time-step", "Time of a step", "seconds", (("time/step", "whole step"),)),
        _Panel("time-parts", "Time by part", "seconds",
               (("time/rollout", "rollout"), ("time/update", "update"), ("time/reward", "reward"),
                ("time/logprobs", "log-probabilities")), of_single=True),
    )),
)  # fmt: skip


def sections(groups: Sequence[Group]) -> tuple[list[tuple[str, list[Chart]]], list[str]]:
    """The charts of the runs by section, and the metrics that none of them shows."""
    known = list(dict.fromkeys(name for group in groups for name in group.metrics))
    shown: set[str] = set()
    found = []
    for title, panels in _SECTIONS:
        charts = []
        for panel in panels:
            pairs = list(_metrics(panel, known))
            shown.update(metric for metric, _ in pairs)
            if not (panel.of_single and len(groups) > 1):
                charts += _charts(panel, pairs, groups)
        if charts:
            found.append((title, charts))
    return found, [name for name in known if name not in shown]


def _metrics(panel: _Panel, known: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for metric, label in panel.metrics:
        if metric.endswith("*"):
            start = metric[:-1]
            names = [name for name in known if name.startswith(start)]
            found += [(name, label + name.removeprefix(start)) for name in names]
        elif metric in known:
            found.append((metric, label))
    return found


def _charts(
    panel: _Panel, pairs: Sequence[tuple[str, str]], groups: Sequence[Group]
) -> list[Chart]:
    if len(groups) == 1:
        lines = [curve_of(groups[0], *pair, place) for place, pair in enumerate(pairs)]
        parts = [(panel.title, lines)]
    else:
        alone = len(panel.metrics) == 1 and not panel.metrics[0][0].endswith("*")
        parts = [
            (
                panel.title if alone else f"{panel.title}: {label}",
                [curve_of(group, metric, group.title, n) for n, group in enumerate(groups)],
            )
            for metric, label in pairs
        ]
    present = [(title, [c for c in curves if c is not None]) for title, curves in parts]
    parts = [(title, curves) for title, curves in present if curves]
    limits = _limits([c for _, curves in parts for c in curves]) if panel.shares_limits else None
    return [
        Chart(
            f"{panel.name}-{place}",
            title,
            panel.unit,
            curves,
            limits,
            panel.logarithmic and _is_wide(curves),
            panel.ceiling,
            len(groups) > 1,
        )
        for place, (title, curves) in enumerate(parts)
    ]


def _limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    if not curves:
        return None
    low = float(min(curve.low.min() for curve in curves))
    high = float(max(curve.high.max() for curve in curves))
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _is_wide(curves: Sequence[Curve]) -> bool:
    """Whether curves differ by orders of magnitude."""
    low = min(curve.low.min() for curve in curves)
    return bool(low > 0 and max(curve.high.max() for curve in curves) > 20 * low)
