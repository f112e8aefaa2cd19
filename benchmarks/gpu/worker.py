"""A step's process: it probes the device, runs the step's checks, and ends if the device is lost.

It is forked from a server that has imported everything and never touched the GPU, so that it
starts at once. Its output and its news, which check it is at, go to the process that watches.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.cases.case import Absent, Bound, Result, verdict
from benchmarks.gpu import results
from benchmarks.gpu.place import Place, place
from benchmarks.gpu.results import Results, Row
from oisd.run.parent import end_with_parent

PRELOAD = ["benchmarks.gpu.preload"]
LOST, UNPROBED = 3, 4  # exit statuses: the device was lost; it did not answer at the start
LONGEST = 300  # characters of a reason


class Wrong(Exception):
    """A fact is not as it must be; says what was found."""


class Outcome(NamedTuple):
    """What a check found, and what it must be."""

    found: Result
    truth: Result
    bound: Bound
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A question that is answered by yes or no."""

    name: str
    run: Callable[[Place], Outcome | str]
    """Raises Wrong, or gives what is to be compared, or what is to be noted."""


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    step: str
    work: str
    """"module:function", called with a `Work`."""
    folder: str
    rehearse: bool
    probe: str = "benchmarks.gpu.worker:probe"
    beside: tuple[str, ...] = ()
    """Steps that run meanwhile."""


@dataclass
class Work:
    """What a step's function works with."""

    task: Task
    news: Connection
    place: Place = field(init=False)
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.place = place(self.task.rehearse)
        self.results = Results(self.task.folder)

    def begin(self, name: str, known: set[str] | None = None) -> bool:
        """Say that a check is begun, unless it is known: then False."""
        if name in (self.results.known(self.task.step) if known is None else known):
            return False
        self.results.append({"kind": "begin", "step": self.task.step, "name": name})
        self.news.send(name)
        return True

    def append(self, kind: str, name: str, verdict: str, **fields: Any) -> None:
        """A result, on disk at once."""
        row: Row = {"kind": kind, "step": self.task.step, "name": name, "verdict": verdict}
        if self.task.beside:
            row["beside"] = list(self.task.beside)
        self.results.append(row | fields)

    def check(self, name: str, run: Callable[[], Outcome | str]) -> None:
        """Run a check and write down what came of it."""
        if not self.begin(name):
            return
        begun = time.monotonic()
        row, lost = judged(run)
        row["seconds"] = round(time.monotonic() - begun, 2)
        self.append("check", name, **row)
        gc.collect()
        if self.place.device == "cuda":
            lost = lost and device_lost()
            if lost:
                sys.exit(LOST)
            torch.cuda.empty_cache()

    def checks(self, checks: Iterable[Check]) -> None:
        for check in checks:
            self.check(check.name, lambda check=check: check.run(self.place))


def judged(run: Callable[[], Outcome | str]) -> tuple[Row, bool]:
    """A check's verdict with what it rests on, and whether the device may be lost."""
    try:
        outcome = run()
        if isinstance(outcome, str):
            return {"verdict": results.PASSED, "reason": outcome}, False
        # A kernel's fault may show here, at the first number that is waited for.
        measured, wrong = verdict(outcome.found, outcome.truth, outcome.bound)
    except Wrong as error:
        return {"verdict": results.WRONG, "reason": str(error)[:LONGEST]}, False
    except Absent as error:
        return {"verdict": results.ABSENT, "reason": str(error)[:LONGEST]}, False
    except torch.OutOfMemoryError as error:
        return {"verdict": results.MEMORY, "reason": text(error)}, False
    except Exception as error:
        traceback.print_exc()
        return {"verdict": results.FAILED, "reason": text(error)}, True
    # JSON knows no NaN.
    errors = {name: x if math.isfinite(x) else None for name, x in measured.items()}
    row: Row = {"verdict": results.WRONG if wrong else results.PASSED, "errors": errors}
    row |= {"bound": asdict(outcome.bound), "reason": wrong or outcome.note}
    return row, False


def text(error: BaseException) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:LONGEST]


def device_lost() -> bool:
    try:
        torch.cuda.synchronize()
        torch.ones(8, device="cuda").sum().item()
    except Exception:
        return True
    return False


def probe(device: str) -> None:
    """Raises where the device does not compute."""
    total = torch.ones(8, device=device).sum().item()
    if total != 8:
        raise RuntimeError(f"eight ones add up to {total}")


def find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def serve(task: Task, output: Connection, news: Connection) -> None:
    """The whole life of a step's process."""
    os.setsid()  # it is killed with all that it started
    end_with_parent(signal.SIGKILL)  # without the queue nobody would stop what hangs
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    torch.set_num_threads(1)
    work = Work(task, news)
    try:
        find(task.probe)(work.place.device)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(UNPROBED)
    news.send("")
    find(task.work)(work)


def answer(task: Task, output: Connection, news: Connection) -> None:
    """The life of a process that only asks whether the device is alive."""
    serve(Task(task.step, "benchmarks.gpu.worker:nothing", task.folder, task.rehearse, task.probe),
          output, news)  # fmt: skip


def nothing(work: Work) -> None:
    """The work of a process that has none."""
