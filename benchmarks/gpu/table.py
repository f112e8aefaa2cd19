"""What is printed last: at most LINES lines of what a folder's results say and decide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.results import Results, Row
from benchmarks.gpu.watch import Step
from benchmarks.report.bars import Judged, judge

LINES, WIDTH = 60, 150
MOST_FAULTS, MOST_BARS = 14, 22
NAME = "table.txt"


def table(folder: Path, steps: Sequence[Step], rehearsal: bool) -> str:
    """The table of a folder."""
    rows = Results(folder).rows()
    ends: dict[str, Row] = {row["step"]: row for row in rows if row["kind"] == "step"}
    lines = [heading(rows, rehearsal), ""]
    for step in steps:
        lines.append(step_line(step, ends.get(step.name)))
    faulty = faults(rows)
    if faulty:
        lines += ["", "What is not right:", *most(faulty, MOST_FAULTS)]
    bars = judge(last_measurements(rows))
    if bars and rehearsal:
        lines += ["", f"{len(bars)} bars would be judged; a rehearsal's times say nothing."]
    elif bars:
        lines += ["", "Bars:", *most([bar_line(bar) for bar in bars], MOST_BARS)]
    return "\n".join(line[:WIDTH] for line in most(lines, LINES)) + "\n"


def heading(rows: Sequence[Row], rehearsal: bool) -> str:
    """Where and with what."""
    machines = [row["machine"] for row in rows if "machine" in row]
    if rehearsal:
        return "REHEARSAL on a CPU, small shapes, Triton's interpreter: no result of a GPU."
    if not machines:
        return "No machine answered."
    found = machines[-1]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "triton")
                         if name in found["versions"])  # fmt: skip
    return f"{found['device']}, driver {found['driver']}, {versions}, {found['date']}"


def step_line(step: Step, end: Row | None) -> str:
    """A step's verdict, numbers, and what it decides."""
    if end is None:
        return f"{step.name:<34} not begun"
    count = end.get("count") or {}
    total = sum(count.values())
    passed = f"{count.get(results.PASSED, 0)}/{total}" if total else ""
    why = end.get("reason") if end["verdict"] != results.PASSED else ""
    last = why or f"-> {step.decides}"
    return f"{step.name:<34} {end['verdict']:<13} {passed:>7} {end['seconds']:>5.0f} s  {last}"


def faults(rows: Sequence[Row]) -> list[str]:
    """Each check, test and measurement whose last verdict is bad."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "name" in row and "verdict" in row:
            last[row["step"], row["name"]] = row
    found = []
    for (_, name), row in last.items():
        if row["verdict"] in results.BAD:
            tail = row.get("last") or []
            text = f"  {row['verdict']}: {name}: {row.get('reason', '')}"
            found.append(text + (f" | {tail[-1]}" if tail else ""))
    return found


def last_measurements(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The last row of each case and implementation."""
    found = {(row["case"], row["implementation"]): row for row in rows
             if row["kind"] == "measurement"}  # fmt: skip
    return list(found.values())


def bar_line(bar: Judged) -> str:
    unit = f" {bar.unit}" if bar.unit != "x" else "x"
    if bar.measured is None:
        return f"  {bar.verdict}: {bar.case}: {bar.text} ({bar.reason})"
    return (
        f"  {bar.verdict}: {bar.case}: {bar.text}: {bar.measured:.3g}{unit}, "
        f"wanted <= {bar.at_most:.3g}{unit}"
    )


def most(lines: list[str], count: int) -> list[str]:
    """At most so many, the last of which says how many more there are."""
    if len(lines) <= count:
        return lines
    return [*lines[: count - 1], f"  ... and {len(lines) - count + 1} more in {results.NAME}"]
