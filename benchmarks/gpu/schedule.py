"""Which step is begun when: best first, within the minutes, what is timed alone.

Neighbours that may run together do, a few at a time. A step that does not fit into what is left is
skipped, with that reason; a dead device ends the queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from benchmarks.gpu import results
from benchmarks.gpu.results import Results, Row
from benchmarks.gpu.watch import DeviceDead, Step, Watch

RESERVE = 8.0  # seconds to stop the last step, and for the table
ENOUGH = (results.PASSED, results.WRONG)  # verdicts of a step whose work another one needs
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
    _pending: dict[str, Future[None]] = field(default_factory=dict)
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
            for step in todo:
                if step.background:
                    self._running.append(step.name)
                    self._pending[step.name] = aside.submit(self._one, step)
            for group in groups([step for step in todo if not step.background]):
                # The pool's threads only wait for processes.
                with ThreadPoolExecutor(self.at_once if group[0].together else 1) as pool:
                    list(pool.map(self._one, group))
            for one in self._pending.values():
                one.result()
        return not self.watch.dead.is_set()

    def _one(self, step: Step) -> None:
        row = self._row(step)
        Results(self.watch.folder).append(row)
        with self._lock:
            if step.background:
                self._running.remove(step.name)
            self.verdicts[step.name] = row["verdict"]
            self.say(line(row))

    def _row(self, step: Step) -> Row:
        row: Row = {"kind": "step", "step": step.name, "seconds": 0.0, "count": {}}
        for name in step.after:
            if name in self._pending:
                wait([self._pending[name]], max(self._left() - step.least, 0))
        left = self._left()
        why = self._why_not(step, left)
        if why:
            return row | {"verdict": results.SKIPPED, "reason": why}
        with self._lock:
            beside = () if step.together or step.background else tuple(self._running)
        try:
            return self.watch.run(step, min(step.seconds, left), beside)
        except DeviceDead as error:
            return row | {"verdict": results.DEAD, "reason": str(error)[:LONGEST_LINE]}

    def _left(self) -> float:
        return self.end - RESERVE - time.monotonic()

    def _why_not(self, step: Step, left: float) -> str:
        if self.watch.dead.is_set():
            return "the device is dead"
        if left < step.least:
            return f"needs {step.least:.0f} s, {max(left, 0):.0f} s are left"
        for name in step.after:
            if self.verdicts.get(name) not in ENOUGH:
                return f"needs {name!r}, which is {self.verdicts.get(name, 'not finished')}"
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
