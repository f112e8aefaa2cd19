"""Runs cases: correctness, then time and memory of what is correct; a row for each implementation.

`python -m benchmarks.runner` is the worker process. `orchestrate` starts it, starts another if it
dies, and reports the case that it died in, so that one broken kernel costs one case.
"""

from __future__ import annotations

import gc
import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.case import (
    Absent,
    Case,
    Implementation,
    Inputs,
    Result,
    Run,
    expected,
    size,
    verdict,
)
from benchmarks.measure import memory, roofline, timer
from benchmarks.measure.machine import ROOT, append, describe
from benchmarks.measure.promises import promises
from benchmarks.measure.timer import Plan

Row, Runs = dict[str, Any], dict[str, Run]
MATMUL, COPY, TIMES = "bare matmul", "copy", "times"
LONGEST_REASON = 300
NO_TIME, NO_START = "the time budget was used up", "the process did not start: see worker.log"
WORKER = [sys.executable, "-m", "benchmarks.runner"]


@dataclass(frozen=True)
class Options:
    """Settings of a run."""

    out: str
    """Folder of rows.jsonl."""
    device: str = "cpu"
    quick: bool = False
    threads: int = 1
    warmup: int = 1
    rounds: int = 10
    seconds_per_case: float = 60.0
    """After so many seconds of timing a case gets no further round beyond the third."""
    case_limit: float = 900.0
    """Seconds; a case that takes longer is stopped and reported."""
    deadline: float = float("inf")
    """Seconds since the epoch; no case begins after it."""
    stop: float = float("inf")
    """Seconds since the epoch; a case that still runs then is stopped."""
    peaks: bool = True
    """On a CPU: peak memory, each in a fresh process."""

    @property
    def rows(self) -> Path:
        return Path(self.out) / "rows.jsonl"

    @property
    def plan(self) -> Plan:
        return Plan(self.warmup, self.rounds, min(3, self.rounds), self.seconds_per_case)


class DeviceLost(RuntimeError):
    """The GPU no longer answers, so whatever this process starts next would fail, too."""


class Listener:
    """Hears what a case has come to. This one does not care."""

    def begins(self, what: str) -> bool:
        """An implementation, or TIMES, is begun; False leaves it out."""
        return True

    def checked(self, row: Row) -> None:
        """An implementation's errors and its peak memory are known, its time is not."""


NOBODY = Listener()


# In the worker


def run_case(case: Case, options: Options, listener: Listener = NOBODY) -> list[Row]:
    """Rows of a case, one for each implementation; a broken one raises nothing."""
    rows = {i.name: blank(case, i) for i in case.implementations}
    try:
        inputs = case.inputs()
        runs = _checked(case, inputs, options, rows, listener)
        if runs and listener.begins(TIMES):
            _free(case.device)
            _measure(case, inputs, runs, options, rows)
    except torch.OutOfMemoryError as error:
        _fail(rows.values(), "out of memory", f"the inputs or their truth: {_text(error)}")
    except Exception as error:
        _fail(rows.values(), "failed", _text(error))
    return list(rows.values())


def blank(case: Case, implementation: Implementation) -> Row:
    """A row that says only what is to be measured."""
    bars = [asdict(bar) for bar in case.bars if bar.implementation == implementation.name]
    return {
        "kind": "measurement",
        "case": case.name,
        "family": case.family,
        "implementation": implementation.name,
        "status": "",
        "reason": "",
        "note": implementation.note,
        "shape": dict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "regime": case.regime,
        "seed": case.seed,
        "checked_at": case.checked_at,
        "bars": bars,
    }


def _checked(
    case: Case, inputs: Inputs, options: Options, rows: Mapping[str, Row], listener: Listener
) -> Runs:
    """The correct implementations, ready to be timed; the others' rows say why they are not."""
    small = case.check_inputs(inputs) if case.check_inputs else inputs
    truth: Result | None = None
    runs: Runs = {}
    for implementation in case.implementations:
        row = rows[implementation.name]
        absent = not_run(case, implementation, options)
        if absent:
            row["status"], row["reason"] = absent
            listener.checked(row)
            continue
        if not listener.begins(implementation.name):
            row["status"], row["reason"] = "failed", "it ended an earlier process"
            continue
        if truth is None:
            truth = case.truth(small)
        try:
            bound = implementation.bound or case.bound
            want = expected(truth, implementation.weighted, small.get("factor"))
            found = implementation.make(small)()
            measured, wrong = verdict(found, want, bound)
            # JSON knows no NaN.
            row["errors"] = {k: x if math.isfinite(x) else None for k, x in measured.items()}
            row["bound"] = asdict(bound)
            if wrong:
                row["status"], row["reason"] = "wrong", wrong
                continue
            run = implementation.make(inputs)
            if case.device == "cuda" or case.check_inputs:
                found = run()  # its buffers and its kernels
            row["outputs_mib"] = size(found.values()) / memory.MIB
            del found
            if case.device == "cuda":
                row["peak_mib"] = memory.cuda_peak(run, case.whole)
            runs[implementation.name] = run
        except Absent as error:
            row["status"], row["reason"] = "absent", str(error)[:LONGEST_REASON]
        except torch.OutOfMemoryError as error:
            row["status"], row["reason"] = "out of memory", _text(error)
        except Exception as error:
            row["status"], row["reason"] = "failed", _text(error)
            _require_device(case.device)
        listener.checked(row)
        _free(case.device)
    return runs


def not_run(case: Case, implementation: Implementation, options: Options) -> tuple[str, str] | None:
    """(status, reason) of an implementation that is not tried."""
    if implementation.absent:
        return "absent", implementation.absent
    if implementation.compiles and options.quick:
        if case.device == "cpu" or not case.compiled:
            return "skipped", "--quick leaves compilation out"
    free = memory.available()
    if case.device == "cpu" and implementation.needs > 0.7 * free:
        needs = implementation.needs / 2**30
        return "skipped", f"would take about {needs:.0f} GiB, {free / 2**30:.0f} GiB are free"
    return None


def _measure(
    case: Case, inputs: Inputs, runs: Runs, options: Options, rows: Mapping[str, Row]
) -> None:
    yardstick = case.yardstick(inputs)
    copy, copied = roofline.copy(case.device)
    bare = {MATMUL: yardstick.run, COPY: copy}
    # The check was a run already, on a CPU; the GPU's clocks and caches get the stated warm-up.
    warm = replace(options.plan, warmup=options.warmup if case.device == "cuda" else 0)
    for function in bare.values():
        function()
    seconds = timer.interleaved({**runs, **bare}, warm, case.device)
    limit = roofline.Limit.measured(yardstick.flops, seconds[MATMUL], copied, seconds[COPY])
    for name in runs:
        row = rows[name]
        median, p20, p80 = timer.spread(seconds[name])
        row |= {
            "status": "ok",
            "warmup": options.warmup,
            "rounds": len(seconds[name]),
            "seconds": seconds[name],
            "yardstick_seconds": seconds[MATMUL],
            "median_s": median,
            "p20_s": p20,
            "p80_s": p80,
            "floor_flops": case.flops,
            "floor_bytes": case.bytes,
            "tflops": case.flops / median / 1e12,
            "matmul_tflops": limit.flops_per_second / 1e12,
            "copy_gbps": limit.bytes_per_second / 1e9,
            "roofline_s": limit.seconds(case.flops, case.bytes),
            "roofline_percent": limit.percent(case.flops, case.bytes, median),
        }
        if case.device == "cpu" and options.peaks:
            try:
                row["peak_mib"] = memory.cpu_peak(
                    case.name, name, options.threads, timeout=options.case_limit / 2
                )
            except memory.MemoryFailure as error:
                row["peak_reason"] = str(error)
        if "peak_mib" in row and not case.whole:
            row["workspace_mib"] = row["peak_mib"] - row["outputs_mib"]


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _require_device(device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(f"the device no longer answers: {_text(error)}") from error


def _fail(rows: Iterable[Row], status: str, reason: str) -> None:
    for row in rows:
        if not row["status"]:
            row["status"], row["reason"] = status, reason


def _text(error: BaseException) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:LONGEST_REASON]


def _work(names: Sequence[str], options: Options) -> None:
    from benchmarks.cases.suite import all_cases  # with the trainer, which imports transformers

    torch.set_num_threads(options.threads)
    machine = describe(options.device, options.threads)
    known = {case.name: case for case in all_cases(options.device)}
    for name in names:
        case = known[name]
        if time.time() > options.deadline:
            rows = not_begun(case, "skipped", NO_TIME)
        else:
            print(f"begin {name}", flush=True)
            rows = run_case(case, options)
        append(options.rows, rows, machine)
        print(f"end {name}", flush=True)
        if any("no longer answers" in row["reason"] for row in rows):
            sys.exit(3)
        torch.compiler.reset()  # after a few shapes dynamo stops compiling, silently
        _free(options.device)


def not_begun(case: Case, status: str, reason: str) -> list[Row]:
    rows = [blank(case, i) for i in case.implementations]
    _fail(rows, status, reason)
    return rows


# In the process that watches


def count_promises(options: Options) -> None:
    """Append their rows. Counted on a CPU, whatever the device."""
    rows = [promise.row() for promise in promises()]
    append(options.rows, rows, describe(options.device, options.threads))


def orchestrate(cases: Sequence[Case], options: Options, say: Callable[[str], None]) -> None:
    """Run the cases in worker processes and append their rows to `options.rows`."""
    remaining = {case.name: case for case in cases}
    machine = describe(options.device, options.threads)
    while remaining:
        before = len(remaining)
        died = _watch(list(remaining), options, remaining, say)
        if died is not None:
            name, reason = died
            append(options.rows, not_begun(remaining.pop(name), "failed", reason), machine)
            say(f"  {name}: FAILED, {reason}")
        late = time.time() > options.deadline
        if late or len(remaining) == before:
            why = ("skipped", NO_TIME) if late else ("failed", NO_START)
            for case in remaining.values():
                append(options.rows, not_begun(case, *why), machine)
            return


def _watch(
    names: Sequence[str],
    options: Options,
    remaining: dict[str, Case],
    say: Callable[[str], None],
) -> tuple[str, str] | None:
    """Run one worker, removing what it finished from `remaining`; (case, cause) if it died."""
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with (Path(options.out) / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, text=True
        )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"names": list(names), "options": asdict(options)}))
    process.stdin.close()
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    current, begun = "", time.time()
    while True:
        limit = min(begun + options.case_limit, options.stop)
        try:
            line = lines.get(timeout=max(limit - time.time(), 0.1))
        except queue.Empty:
            process.kill()
            process.wait()
            spent = time.time() - begun
            return (current or names[0]), f"stopped after {spent:.0f} s"
        if line is None:
            break
        word, _, name = line.strip().partition(" ")
        if word == "begin":
            current, begun = name, time.time()
        elif word == "end" and name in remaining:
            del remaining[name]
            if current == name:
                say(f"  {name}: {time.time() - begun:.0f} s")
            current, begun = "", time.time()
    status = process.wait()
    if not current:
        return None
    cause = "killed, perhaps because memory ran out" if status == -9 else f"ended with {status}"
    return current, f"the process {cause}; see worker.log"


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        if line.startswith(("begin ", "end ")):  # libraries print other lines
            lines.put(line)
    lines.put(None)


def main() -> None:
    """Run the cases that standard input names."""
    given = json.loads(sys.stdin.read())
    _work(given["names"], Options(**given["options"]))


if __name__ == "__main__":
    main()
