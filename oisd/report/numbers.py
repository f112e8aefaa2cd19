"""First, best and last values of each run, and of each group with intervals over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import mpmath

from oisd.report.curves import number
from oisd.report.runs import Group, Run

LEAST_SEEDS = 3
"""Of fewer runs no interval is given, but each one's value."""


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two independent values, by Student's t."""
    mean, count = statistics.fmean(values), len(values)
    half = _t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def _t_quantile(freedom: int) -> float:
    """The value that Student's t exceeds in absolute value with a probability of 5 %."""

    def tail(t: Any) -> Any:
        x = freedom / (freedom + t * t)
        return mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) - 0.05

    return float(mpmath.findroot(tail, (1.5, 14), solver="anderson"))


def _pass_metric(run: Run) -> str:
    found = [name for name in run.metrics if name.startswith("eval/pass_at_")]
    return found[0] if found else ""


def _at(run: Run, metric: str, choose: Callable[[list[float]], float]) -> float | None:
    values = list(run.values(metric).values())
    return choose(values) if values else None


def _first(values: list[float]) -> float:
    return values[0]


def _last(values: list[float]) -> float:
    return values[-1]


_TIME = "seconds a step"
# Title, and what a run has of it.
_COLUMNS: tuple[tuple[str, Callable[[Run], float | None]], ...] = (
    ("Avg@K first", lambda run: _at(run, "eval/avg_at_k", _first)),
    ("Avg@K best", lambda run: _at(run, "eval/avg_at_k", max)),
    ("Avg@K last", lambda run: _at(run, "eval/avg_at_k", _last)),
    ("Pass@K last", lambda run: _at(run, _pass_metric(run), _last)),
    ("reward, last steps", lambda run: run.tail_mean("reward")),
    ("completion length, last steps", lambda run: run.tail_mean("completion_length")),
    (_TIME, lambda run: _at(run, "time/step", statistics.fmean)),
)


def group_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each group; columns that no run has are left out."""
    shown = _shown([run for group in groups for run in group.runs])
    rows = []
    for group in groups:
        cells = [_spread([value(run) for run in group.runs], title) for title, value in shown]
        rows.append([group.title, ", ".join(map(str, group.seeds)), *cells])
    return ["group", "seeds", *(title for title, _ in shown)], rows


def run_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each run, Avg@K last with its interval over the problems."""
    runs = [run for group in groups for run in group.runs]
    shown = _shown(runs)
    rows = []
    for group in groups:
        for run in group.runs:
            cells = []
            for title, value in shown:
                found = value(run)
                cell = "" if found is None else number(found)
                cells.append(cell + (_over_problems(run) if title == "Avg@K last" else ""))
            seed = str(run.config.run.seed)
            rows.append([f"{group.letter}: {run.name}", seed, str(run.steps), *cells])
    return ["run", "seed", "steps", *(title for title, _ in shown)], rows


def _shown(runs: Sequence[Run]) -> list[tuple[str, Callable[[Run], float | None]]]:
    return [(t, value) for t, value in _COLUMNS if any(value(run) is not None for run in runs)]


def _spread(values: Sequence[float | None], title: str) -> str:
    """The mean, and an interval of at least three runs or the values of two; of times, the range.

    How long a run takes tells more of what else its machine did than of its seed.
    """
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = number(statistics.fmean(found))
    if title == _TIME and len(found) > 1:
        return f"{mean}\n({number(min(found))} to {number(max(found))})"
    if len(found) >= LEAST_SEEDS:
        low, high = mean_interval(found)
        return f"{mean}\n[{number(low)}, {number(high)}]"
    return mean if len(found) == 1 else f"{mean}\n({', '.join(map(number, found))})"


def _over_problems(run: Run) -> str:
    """The interval of the last evaluation over its problems, if it is of the last row."""
    steps, rows = run.evaluated_steps, run.values("eval/avg_at_k")
    if not steps or not rows or steps[-1] != max(rows):
        return ""
    interval: Any = run.summary(steps[-1]).get("avg_at_k_interval")
    return f" [{number(interval[0])}, {number(interval[1])}]" if interval else ""
