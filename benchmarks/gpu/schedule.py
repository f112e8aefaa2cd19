"""Which step is begun when: best first, within the minutes, what is timed alone.

Neighbours that may run together do, a few at a time. A step that does not fit into what is left is
skipped, with that reason; a dead device ends the queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks.gpu import results
from benchmarks.gpu.results import Results, Row
from benchmarks.gpu.watch import DeviceDead, Step, Watch

RESERVE = 5.0  # seconds for the table
LONGEST_LINE = 160


@dataclass
class Schedule:
    """A queue and the time it has."""

    watch: Watch
    end: float
    """Of `time.monotonic`; everything ends before it."""
    at_once: int
    say: Callable[[str], None] = print
    verdicts: dict[str, str] = field(default_factory=dict)
    _running: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, steps: Sequence[Step]) -> bool:
        """Run all that are not done; whether the device is alive."""
        found = Results(self.watch.folder)
        self.verdicts |= found.done()
        todo = [step for step in steps if step.name not in self.verdicts]
        for step in steps:
            if step.name in self.verdicts:
                self.say(f"{step.name}: {self.verdicts[step.name]}, as found before")
        with ThreadPoolExecutor(len(steps) or 1) as aside:
            pending = [aside.submit(self._one, step) for step in todo if step.background]
            for group in groups([step for step in todo if not step.background]):
                # The pool's threads only wait for processes.
                with ThreadPoolExecutor(self.at_once if group[0].together else 1) as pool:
                    list(pool.map(self._one, group))
            for one in pending:
                one.result()
        return not self.watch.dead.is_set()

    def _one(self, step: Step) -> None:
        row = self._row(step)
        Results(self.watch.folder).append(row)
        with self._lock:
            self.verdicts[step.name] = row["verdict"]
            self.say(line(row))

    def _row(self, step: Step) -> Row:
        row: Row = {"kind": "step", "step": step.name, "seconds": 0.0, "count": {}}
        left = self.end - RESERVE - time.monotonic()
        why = self._why_not(step, left)
        if why:
            return row | {"verdict": results.SKIPPED, "reason": why}
        with self._lock:
            beside = () if step.together else tuple(self._running)
            if step.background:
                self._running.append(step.name)
        try:
            return self.watch.run(step, min(step.seconds, left), beside)
        except DeviceDead as error:
            return row | {"verdict": results.DEAD, "reason": str(error)[:LONGEST_LINE]}
        finally:
            if step.background:
                with self._lock:
                    self._running.remove(step.name)

    def _why_not(self, step: Step, left: float) -> str:
        if self.watch.dead.is_set():
            return "the device is dead"
        if left < step.least:
            return f"needs {step.least:.0f} s, {max(left, 0):.0f} s are left"
        for name in step.after:
            if self.verdicts.get(name) != results.PASSED:
                return f"needs {name!r}, which is {self.verdicts.get(name, 'not there')}"
        return ""


def groups(steps: Iterable[Step]) -> list[list[Step]]:
    """Neighbours that run together, and each other step by itself."""
    found: list[list[Step]] = []
    for step in steps:
        if step.together and found and found[-1][0].together:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def line(row: Row) -> str:
    """A step's end in a line."""
    count = ", ".join(f"{number} {verdict}" for verdict, number in row["count"].items())
    parts = [f"{row['step']}: {row['verdict']}", count, row.get("reason", "")]
    text = "; ".join(part for part in parts if part)
    return f"{text} ({row['seconds']:.0f} s)"[:LONGEST_LINE]
