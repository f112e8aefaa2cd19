"""The targets of speed and memory, judged by the rows of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
UNITS = {
    "median_s": "time",
    "peak_mib": "peak memory",
    "workspace_mib": "memory beside outputs and gradients",
}


@dataclass(frozen=True)
class Judged:
    """A bar and what was measured."""

    case: str
    text: str
    measured: float | None  # None: something was not measured
    at_most: float
    unit: str  # "x" of another, or "MiB"
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.at_most else "MISSED"


def judge(rows: Iterable[Row]) -> list[Judged]:
    """Every bar of the rows."""
    rows = list(rows)
    known = {(row["case"], row["implementation"]): row for row in rows}
    return [_judge(row, bar, known) for row in rows for bar in row.get("bars", [])]


def _judge(row: Row, bar: dict[str, Any], known: dict[tuple[str, str], Row]) -> Judged:
    metric, against, limit = bar["metric"], bar["against"], bar["at_most"]
    what = f"{row['implementation']}: {UNITS[metric]}"
    mine = row.get(metric)
    if against is None:
        return Judged(row["case"], what, mine, limit, "MiB", row["reason"])
    if against == "roofline":
        text, theirs, why = f"{what} against the roofline", row.get("roofline_s"), row["reason"]
    else:
        other = known.get((bar["case"] or row["case"], against), {})
        where = f" at {bar['case']}" if bar["case"] else ""
        text, theirs = f"{what} against {against}{where}", other.get(metric)
        why = row["reason"] or _why(against, other)
    measured = mine / theirs if mine is not None and theirs else None
    return Judged(row["case"], text, measured, limit, "x", "" if measured is not None else why)


def _why(name: str, row: Row) -> str:
    if not row:
        return f"{name} was not run"
    return f"{name}: {row['status']}" + (f", {row['reason']}" if row["reason"] else "")
