"""Runs cases: correctness, then time and memory of what is correct; one row for everything listed.

`python -m benchmarks.runner OPTIONS` is the process that works. `orchestrate` starts it, starts
another where it died, and reports the case that it died in; so one broken kernel costs one case.
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

from benchmarks.cases.case import Absent, Case, Implementation, Result, Run, expected, size, verdict
from benchmarks.cases.suite import all_cases
from benchmarks.measure import memory, roofline, timer
from benchmarks.measure.machine import ROOT, describe
from benchmarks.measure.timer import Plan

Row = dict[str, Any]
MATMUL, COPY = "bare matmul", "copy"
LONGEST_REASON = 300
WORKER = [sys.executable, "-m", "benchmarks.runner"]


@dataclass(frozen=True)
class Options:
    """How a run goes."""

    out: str
    """Folder of rows.jsonl."""
    device: str = "cpu"
    quick: bool = False
    threads: int = 1
    warmup: int = 1
    rounds: int = 10
    seconds_per_case: float = 60.0
    """After so many seconds of timing a case gets no further round, beyond the third."""
    case_limit: float = 900.0
    """A case that takes longer is stopped and reported."""
    deadline: float = float("inf")
    """Seconds since the epoch; no case begins after it."""
    stop: float = float("inf")
    """Seconds since the epoch; the case that still runs is stopped."""

    @property
    def plan(self) -> Plan:
        return Plan(self.warmup, self.rounds, min(3, self.rounds), self.seconds_per_case)


class DeviceLost(RuntimeError):
    """The GPU answers no more; whatever this process starts next would fail, too."""


# In the process that works


def run_case(case: Case, options: Options) -> list[Row]:
    """Rows of a case, one for each implementation; nothing is raised for a broken one."""
    rows = {i.name: blank(case, i) for i in case.implementations}
    try:
        inputs = case.inputs()
        runs = _checked(case, inputs, options, rows)
        if runs:
            _free(case.device)
            _measure(case, inputs, runs, options, rows)
    except torch.OutOfMemoryError as error:
        _fail(rows.values(), "out of memory", f"the inputs or their truth: {_text(error)}")
    except Exception as error:
        _fail(rows.values(), "failed", _text(error))
    return list(rows.values())


def blank(case: Case, implementation: Implementation) -> Row:
    """A row before anything is known but what was to be measured."""
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
    case: Case, inputs: dict[str, Any], options: Options, rows: Mapping[str, Row]
) -> dict[str, Run]:
    """What is correct, ready to be timed; the rows of the rest say what became of them."""
    small = case.check_inputs(inputs) if case.check_inputs else inputs
    truth: Result | None = None
    runs: dict[str, Run] = {}
    for implementation in case.implementations:
        row = rows[implementation.name]
        absent = not_run(case, implementation, options)
        if absent:
            row["status"], row["reason"] = absent
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
    case: Case,
    inputs: dict[str, Any],
    runs: dict[str, Run],
    options: Options,
    rows: Mapping[str, Row],
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
    if case.device == "cpu":
        _cpu_memory(case, runs, options, rows)
    for row in rows.values():
        if "peak_mib" in row and not case.whole:
            row["workspace_mib"] = row["peak_mib"] - row["outputs_mib"]


def _cpu_memory(
    case: Case, runs: Mapping[str, Run], options: Options, rows: Mapping[str, Row]
) -> None:
    for name in runs:
        try:
            limit = options.case_limit / 2
            rows[name]["peak_mib"] = memory.cpu_peak(case.name, name, options.threads, limit)
        except memory.MemoryFailure as error:
            rows[name]["peak_reason"] = str(error)


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
    torch.set_num_threads(options.threads)
    machine = describe(options.device, options.threads)
    known = {case.name: case for case in all_cases(options.device)}
    for name in names:
        case = known[name]
        if time.time() > options.deadline:
            rows = not_begun(case, "the time budget was used up")
        else:
            print(f"begin {name}", flush=True)
            rows = run_case(case, options)
        write(options.out, rows, machine)
        print(f"end {name}", flush=True)
        if any("no longer answers" in row["reason"] for row in rows):
            sys.exit(3)
        torch.compiler.reset()  # past a few shapes dynamo compiles no more, without a word
        _free(options.device)


def not_begun(case: Case, reason: str) -> list[Row]:
    rows = [blank(case, i) for i in case.implementations]
    _fail(rows, "skipped", reason)
    return rows


def write(out: str, rows: Iterable[Row], machine: Mapping[str, Any]) -> None:
    """Append to the folder's rows."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with (Path(out) / "rows.jsonl").open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **machine}) + "\n")


# In the process that watches


def orchestrate(cases: Sequence[Case], options: Options, say: Callable[[str], None]) -> None:
    """Run the cases in processes of their own and append their rows to `options.out`."""
    remaining = {case.name: case for case in cases}
    machine = describe(options.device, options.threads)
    while remaining:
        before = len(remaining)
        died = _watch(list(remaining), options, remaining, say)
        if died is not None:
            name, reason = died
            rows = not_begun(remaining.pop(name), reason)
            _fail_again(rows)
            write(options.out, rows, machine)
            say(f"  {name}: FAILED, {reason}")
        if time.time() > options.deadline:
            for case in remaining.values():
                write(options.out, not_begun(case, "the time budget was used up"), machine)
            return
        if len(remaining) == before:
            for case in remaining.values():
                rows = not_begun(case, "the process did not start: see worker.log")
                _fail_again(rows)
                write(options.out, rows, machine)
            return


def _fail_again(rows: Iterable[Row]) -> None:
    for row in rows:
        row["status"] = "failed"


def _watch(
    names: Sequence[str],
    options: Options,
    remaining: dict[str, Case],
    say: Callable[[str], None],
) -> tuple[str, str] | None:
    """One working process; takes what it finished out of `remaining`. (case, cause) of a death."""
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
    cause = "killed, perhaps for want of memory" if status == -9 else f"ended with {status}"
    return current, f"the process {cause}; see worker.log"


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        if line.startswith(("begin ", "end ")):  # libraries print, too
            lines.put(line)
    lines.put(None)


def main() -> None:
    """Work through the cases that standard input names."""
    given = json.loads(sys.stdin.read())
    _work(given["names"], Options(**given["options"]))


if __name__ == "__main__":
    main()
