"""Two runs side by side: ratios of time and memory with intervals, and what got slower.

Times are divided by those of the bare matmul in the same round, so that two machines, or busy ones,
can be compared. The 95 % interval is a bootstrap over rounds of the ratio of medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.report import table
from benchmarks.report.bars import Row

TIME_TOLERANCE = 1.05  # a ratio whose whole interval is above this is a slowdown
MEMORY_TOLERANCE = 1.03
RESAMPLES = 2000


@dataclass(frozen=True)
class Change:
    """One implementation of one case, new over base."""

    case: str
    implementation: str
    ratio: float | None
    low: float | None
    high: float | None
    memory: float | None
    status: str = ""

    @property
    def flags(self) -> list[str]:
        found = [self.status] if self.status else []
        if self.low is not None and self.low > TIME_TOLERANCE:
            found.append("SLOWER")
        if self.high is not None and self.high < 1 / TIME_TOLERANCE:
            found.append("faster")
        if self.memory is not None and self.memory > MEMORY_TOLERANCE:
            found.append("MORE MEMORY")
        return found

    @property
    def is_worse(self) -> bool:
        return any(flag.isupper() for flag in self.flags)


def changes(base: Sequence[Row], new: Sequence[Row], seed: int = 0) -> list[Change]:
    """Of everything that was measured in the base run."""
    generator = np.random.default_rng(seed)
    known = {(row["case"], row["implementation"]): row for row in _measured(new)}
    found = []
    for row in _measured(base):
        other = known.get((row["case"], row["implementation"]))
        if other is not None and row["status"] == "ok":
            found.append(_change(row, other, generator))
    return found


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "measurement"]


def _change(base: Row, new: Row, generator: np.random.Generator) -> Change:
    if new["status"] != "ok":
        status = f"NOW {new['status'].upper()}"
        return Change(base["case"], base["implementation"], None, None, None, None, status)
    ratio, low, high = interval(relative(base), relative(new), generator)
    memory = None
    if base.get("peak_mib") and new.get("peak_mib"):
        memory = new["peak_mib"] / base["peak_mib"]
    return Change(base["case"], base["implementation"], ratio, low, high, memory)


def relative(row: Row) -> np.ndarray:
    """Time of each round over the bare matmul's in the same round."""
    return np.asarray(row["seconds"]) / np.asarray(row["yardstick_seconds"])


def interval(
    base: np.ndarray, new: np.ndarray, generator: np.random.Generator
) -> tuple[float, float, float]:
    """(ratio of medians, 2.5 % and 97.5 % of its bootstrap over rounds)."""

    def medians(x: np.ndarray) -> np.ndarray:
        index = generator.integers(len(x), size=(RESAMPLES, len(x)))
        return np.median(x[index], axis=1)

    low, high = np.quantile(medians(new) / medians(base), [0.025, 0.975])
    return float(np.median(new) / np.median(base)), float(low), float(high)


def text(found: Sequence[Change]) -> str:
    """A table, the worst first, and a line that sums it up."""
    if not found:
        return "Nothing was measured in both runs."
    order = sorted(found, key=lambda c: (not c.is_worse, -(c.ratio or 0)))
    lines = [
        [
            c.case,
            c.implementation,
            "" if c.ratio is None else f"{c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}]",
            "" if c.memory is None else f"{c.memory:.3f}",
            ", ".join(c.flags),
        ]
        for c in order
    ]
    worse = sum(c.is_worse for c in found)
    summary = f"{worse} of {len(found)} got worse." if worse else "Nothing got worse."
    titles = ["case", "implementation", "time, new / base [95 %]", "memory, new / base", ""]
    return table(titles, lines) + "\n\n" + summary
