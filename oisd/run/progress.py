"""What a run shows: a progress bar on a terminal, plain lines elsewhere, trackers; its clock."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from oisd.run.trackers import Trackers

# (label, metric): the numbers beside the bar.
_SHOWN = (
    ("reward", "reward"),
    ("grpo", "loss/grpo"),
    ("think", "loss/think"),
    ("attn", "loss/attention"),
)


class Progress:
    """Shows rewards, losses and time left; disabled on all processes but the first.

    Args:
        total, start: steps of the run, and how many of them are done.
        warmup: supervised steps before the first, 0 for none.
        trackers: get each row of metrics; closed at the end.
    """

    def __init__(
        self, total: int, start: int, warmup: int, enabled: bool, trackers: Trackers
    ) -> None:
        self.total, self.start, self.enabled = total, start, enabled
        self._warmup_steps = warmup
        self._trackers = trackers
        self._console = Console(stderr=True)
        self._interactive = enabled and self._console.is_terminal
        self._bar = Bar(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._interactive,
        )

    def __enter__(self) -> Progress:
        self._began = time.perf_counter()
        self._bar.start()
        self._task = self._bar.add_task(
            "training", total=self.total, completed=self.start, numbers="", visible=False
        )
        self._warming = None
        if self._warmup_steps:
            self._warming = self._bar.add_task("warm-up", total=self._warmup_steps, numbers="")
        if self.start:
            self.say(f"resumed after step {self.start}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        self._trackers.close(failed=kind is not None)

    def warmup(self, step: int, loss: float) -> None:
        """Show that a supervised step is done."""
        if self._warming is not None:
            self._bar.update(self._warming, completed=step + 1, numbers=f"loss {loss:.3f}")
        if self._at_interval(step + 1, self._warmup_steps, 4):
            self.say(f"warm-up {step + 1}/{self._warmup_steps}  loss {loss:.3f}")

    def phase(self, name: str) -> None:
        """Name what the run is doing now."""
        self._bar.update(self._task, description=name)

    def log(self, row: dict[str, Any]) -> None:
        """Show the row of metrics of a finished step and pass it to the trackers."""
        step = row["step"]
        self._trackers.log(row)
        numbers = "  ".join(f"{label} {row[key]:+.4f}" for label, key in _SHOWN if key in row)
        numbers = numbers.replace("reward +", "reward ")
        self._bar.update(self._task, completed=step, numbers=numbers, visible=True)
        for alarm in row.get("alarms", ()):
            self.say(f"step {step}  alarm: {alarm}")
        if "eval/avg_at_k" in row:
            self.say(f"step {step}  evaluation: Avg@K {row['eval/avg_at_k']:.3f}")
        if numbers and self._at_interval(step, self.total, 20):
            spent = time.perf_counter() - self._began
            self.say(f"step {step}/{self.total}  {numbers}  {spent:.0f} s")

    def _at_interval(self, done: int, total: int, lines: int) -> bool:
        """Whether this step gets a line of its own, where there is no terminal for a bar."""
        return not self._interactive and (done == total or done % max(1, total // lines) == 0)

    def say(self, line: str) -> None:
        """Show a line about the run."""
        if self._interactive:
            self._bar.console.print(line)
        elif self.enabled:
            print(line, file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds by phase of a step: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._phase, self._start = "", 0.0

    def __call__(self, phase: str) -> Stopwatch:
        self._phase = phase
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._seconds[self._phase] = time.perf_counter() - self._start

    def times(self) -> dict[str, float]:
        """time/<phase> of each phase, and time/step since this clock was made."""
        spent = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        return {**spent, "time/step": time.perf_counter() - self._begin}
