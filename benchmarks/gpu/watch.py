"""The processes of the steps: what they print and where they are, their limits, their ends.

A process that ends in the middle of a check costs that check: it is written down with the last
output, and a new process goes on with the rest of the step. If a process cannot reach the device,
another one, which shares nothing with it, is asked; if that fails too, the device is dead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu import results, worker
from benchmarks.gpu.results import Results, Row
from benchmarks.gpu.worker import LOST, PRELOAD, UNPROBED, Task

LOG = "log.txt"
LAST = 12  # lines of a broken step's output to keep
PROBE_LIMIT = 90.0
MOST_RESTARTS = 12
JUDGED = ("check", "measurement", "test")  # kinds of rows whose verdicts make the step's


class DeviceDead(Exception):
    """No process can use the device; says what it answered."""


@dataclass(frozen=True)
class Step:
    """A piece of the queue."""

    name: str
    work: str
    """"module:function" of `worker.Work`."""
    seconds: float
    """After so many it is stopped."""
    least: float = 15.0
    """With fewer left it is not begun."""
    together: bool = False
    """Runs beside its neighbours of this kind; what is timed runs alone."""
    background: bool = False
    """Runs beside everything: only the CPUs are used."""
    silent: float = 60.0
    """A check that takes longer hangs."""
    after: tuple[str, ...] = ()
    """Steps whose work it needs; it waits for one that runs in the background."""
    decides: str = ""


class Process:
    """One process of a step, with the end of its output and what it is at."""

    def __init__(self, start: str, target: Callable[..., None], task: Task):
        context: Any = multiprocessing.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        output, theirs = context.Pipe(duplex=False)
        self.news, news = context.Pipe(duplex=False)
        self.last: deque[str] = deque(maxlen=LAST)
        self.at, self.probed, self.since = "", False, time.monotonic()
        self.process = context.Process(target=target, args=(task, theirs, news), daemon=False)
        self.process.start()
        theirs.close()
        news.close()
        log = Path(task.folder) / LOG
        self._reader = threading.Thread(target=self._read, args=(output, log, task.step))
        self._reader.daemon = True
        self._reader.start()

    def _read(self, output: Connection, log: Path, step: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.dup(output.fileno()), "rb") as stream, log.open("ab") as file:
            output.close()
            for line in stream:
                self.last.append(line.decode(errors="replace").rstrip())
                file.write(f"[{step}] ".encode() + line.rstrip(b"\n") + b"\n")
                file.flush()

    def hear(self, seconds: float) -> bool:
        """Take in news for so long; whether the process still runs."""
        with suppress(EOFError, OSError):
            while self.news.poll(seconds):
                self.at, self.since, self.probed = self.news.recv(), time.monotonic(), True
                seconds = 0.0
            return self.process.is_alive()
        self.process.join(max(seconds, 0.5))
        return self.process.is_alive()

    def kill(self) -> bool:
        """End it and all that it started; whether it is gone."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(3)
        return not self.process.is_alive()

    def end(self) -> int | None:
        """Exit status, once its output is read."""
        self.process.join(2)
        self._reader.join(1)  # what it started may hold the pipe
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.exitcode


@dataclass
class Watch:
    """The processes of one queue."""

    folder: str
    rehearse: bool
    probe: str = Task.probe
    start: str = "forkserver"
    end: float = float("inf")
    """Of `time.monotonic`; after it nothing is asked any more."""
    stuck: bool = False
    """A process could not be killed: nobody may wait for it."""
    dead: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, step: Step, limit: float, beside: tuple[str, ...] = ()) -> Row:
        """Run a step within its limit; the row of its end.

        Raises DeviceDead.
        """
        begun = time.monotonic()
        task = Task(step.name, step.work, self.folder, self.rehearse, self.probe, beside)
        row: Row = {"kind": "step", "step": step.name, "reason": ""}
        for _ in range(MOST_RESTARTS):
            start = self.start
            process = Process(start, worker.serve, task)
            why = self._until_end(process, step, begun, limit)
            status = process.end()
            if self.dead.is_set():
                raise DeviceDead("another step found it so")
            if why is None and status == 0:
                break
            if status == UNPROBED and start == self.start:
                self._ask(task, " | ".join(process.last))
                continue
            reason = why or _ending(status)
            hung = reason.startswith("hangs")
            if not process.at or reason.startswith("stopped"):
                row |= {"reason": reason, "at": process.at, "last": list(process.last)}
                row["verdict"] = results.FAILED if why is None else results.STOPPED
                if why is not None and limit < step.seconds:
                    row["verdict"] = results.CUT
                break
            if status != LOST:  # then the check wrote its own end
                verdict = results.STOPPED if hung else results.FAILED
                self._write(step, process, verdict, reason)
            self._ask(task, reason)
        else:
            row |= {"verdict": results.FAILED, "reason": f"ended {MOST_RESTARTS} times"}
        row["seconds"] = round(time.monotonic() - begun, 1)
        return self._judged(row, step)

    def _until_end(self, process: Process, step: Step, begun: float, limit: float) -> str | None:
        """Why the process was stopped, or None where it ended by itself."""
        while process.hear(0.1):
            now = time.monotonic()
            why = ""
            if self.dead.is_set():
                why = "stopped: the device is dead"
            elif now - begun > limit:
                why = f"stopped after {now - begun:.0f} s"
            elif now - process.since > (step.silent if process.probed else PROBE_LIMIT):
                why = f"hangs: no news for {now - process.since:.0f} s"
            if why:
                self.stuck |= not process.kill()
                return f"{why}, and could not be killed" if self.stuck else why
        return None

    def _write(self, step: Step, process: Process, verdict: str, reason: str) -> None:
        """The end of a check whose process did not live to write it."""
        Results(self.folder).append(
            {"kind": "check", "step": step.name, "name": process.at, "verdict": verdict,
             "reason": reason, "last": list(process.last)}
        )  # fmt: skip

    def _ask(self, task: Task, why: str) -> None:
        """After a fault: whether a new process can use the device.

        Where one that was not forked can and a forked one could not, no more are forked.
        """
        with self._lock:
            if self.dead.is_set():
                raise DeviceDead("another step found it so")
            if time.monotonic() > self.end:
                return
            forked = self._answers(task, self.start)
            if forked:
                return
            if self.start == "forkserver" and self._answers(task, "spawn"):
                self.start = "spawn"
                return
            self.dead.set()
            raise DeviceDead(why)

    def _answers(self, task: Task, start: str) -> bool:
        process = Process(start, worker.answer, replace(task, step=f"{task.step}, probe"))
        begun = time.monotonic()
        while process.hear(0.1):
            now = time.monotonic()
            if now > self.end or now - begun > PROBE_LIMIT:
                self.stuck |= not process.kill()
                return now > self.end  # there was no time to find out
        return process.end() == 0

    def _judged(self, row: Row, step: Step) -> Row:
        """With the verdict of its checks, unless the step's end has one, and their numbers."""
        rows = Results(self.folder).rows(step=step.name)
        checks = {row["name"]: row for row in rows if row["kind"] in JUDGED}
        verdicts = [row["verdict"] for row in checks.values()]
        row["count"] = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
        if "verdict" not in row:
            bad = [verdict for verdict in verdicts if verdict in results.BAD]
            row["verdict"] = bad[0] if bad else results.PASSED
            if verdicts and set(verdicts) == {results.ABSENT}:
                row["verdict"] = results.ABSENT
                row["reason"] = next(iter(checks.values()))["reason"]
        return row


def _ending(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "the process was killed, perhaps because memory ran out"
    if status is not None and status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with {status}"
