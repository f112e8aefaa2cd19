"""`python -m benchmarks.cuda_kernels --out DIR`: builds, tests and times csrc/ on one GPU.

Builds every unit, runs the GPU tests of each engine, times them beside Triton's and torch's
attention, and runs the tests again: 250 times, under compute-sanitizer, and over the long sweep.
Each step is a process with a time limit, so a kernel that hangs or crashes the device costs only
its own step. The most important steps come first. DIR holds a log of each step, and summary.json,
which is written after every step.

Needs torch, triton, pytest and pytest-timeout, and nvcc or a filled cache (docs/csrc.md).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_times
from benchmarks.measure.machine import ROOT
from oisd_kernels.cuda import build, driver

# The tests of an engine have one of these words in their names.
ENGINES = {
    "WARP_ENGINE": "(wide or narrow)",
    "WARPGROUP_ENGINE": "hopper",
    "SPECIALIZED_ENGINE": "specialized",
}
TESTS = ("tests/oisd_kernels/cuda/test_csrc.py", "tests/oisd_kernels/attention/test_cuda_ops.py")
RERUNS = "test_250_reruns"
SANITIZED = ("memcheck", "racecheck", "synccheck", "initcheck")
SHOWN = 80  # last lines of a log to print
PASSED = re.compile(r"\b(\d+) passed")


@dataclass(frozen=True)
class Step:
    """A command that must end with status 0 within a time."""

    name: str
    command: Sequence[str]
    seconds: float
    tests: bool = False  # at least one has to pass
    environment: dict[str, str] = field(default_factory=dict)


def pytest_of(select: str, *options: str) -> list[str]:
    """Only GPU tests; one that hangs ends the process, and the log names it."""
    plugin = ["-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider", "--color=no"]
    limit = ["--timeout=120", "--timeout-method=thread"]
    return [sys.executable, "-m", "pytest", *plugin, *limit, "-vv", "-k", select, *options, *TESTS]


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def steps(engines: Sequence[str], tool: str | None) -> list[Step]:
    """All of them, in order."""
    words = {engine: ENGINES[engine] for engine in engines}
    python = [sys.executable, "-m"]
    found = [Step("build", [*python, "oisd_kernels.cuda.build", "--check"], 240)]
    for engine, word in words.items():
        found.append(Step(f"tests {engine}", pytest_of(f"{word} and not {RERUNS}"), 120, True))
    found.append(Step("times", [*python, "benchmarks.cuda_kernels", "--times"], 120))
    for engine, word in words.items():
        found.append(Step(f"reruns {engine}", pytest_of(f"{word} and {RERUNS}"), 120, True))
    # The sanitizer sees no access outside of a tensor that stays within the allocator's block.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in SANITIZED if tool else ():
        for engine, word in words.items():
            command = [str(tool), f"--tool={kind}", "--error-exitcode=9"]
            command += pytest_of(f"{word} and test_against_float64")
            found.append(Step(f"{kind} {engine}", command, 150, True, alone))
    for engine, word in words.items():
        select = pytest_of(f"{word} and every_unit", "-m", "slow")
        found.append(Step(f"sweep {engine}", select, 240, True))
    return found


def run(step: Step, out: Path, left: float) -> dict[str, Any]:
    """Run a step; its result."""
    log = out / f"{step.name.replace(' ', '-').lower()}.log"
    row: dict[str, Any] = {"step": step.name, "log": log.name}
    if left < 10:
        return row | {"verdict": "no time left", "seconds": 0.0}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(min(step.seconds, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    return row | {
        "verdict": verdict(step, status, log.read_text(errors="replace")),
        "seconds": round(time.monotonic() - start, 1),
    }


def verdict(step: Step, status: int | None, log: str) -> str:
    passed = sum(int(count) for count in PASSED.findall(log))
    if status is None:
        return f"not finished, {passed or log.count(' PASSED')} passed"
    if status:
        return f"FAILED: status {status}"
    if step.tests and not passed:
        return "FAILED: no test ran"
    return f"{passed} passed" if step.tests else "ok"


def machine() -> dict[str, Any]:
    nvcc = build.find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True) if nvcc else None
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "shared": driver.shared_limit(0),
        "driver": driver.driver_version(),
        "nvcc": version.stdout.strip().splitlines()[-1] if version else None,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.cuda_kernels")
    parser.add_argument("--out", type=Path, default=Path("runs/cuda-kernels"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", help="steps with this in their name")
    parser.add_argument("--times", action="store_true", help="time alone, in this process")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    if options.times:
        return cuda_times.report()
    end = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"machine": machine(), "steps": []}
    print(json.dumps(summary["machine"]), flush=True)
    for step in steps(cuda_times.engines(), sanitizer()):
        if options.only and options.only not in step.name:
            continue
        row = run(step, out, end - time.monotonic())
        summary["steps"].append(row)
        print(f"{row['step']:<30} {row['seconds']:>6.1f} s  {row['verdict']}", flush=True)
        if step.name == "times" or "FAILED" in row["verdict"] or "not fin" in row["verdict"]:
            lines = (out / row["log"]).read_text(errors="replace").splitlines()
            print("\n".join(lines[-SHOWN:]), flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return int(any("FAILED" in row["verdict"] for row in summary["steps"]))


if __name__ == "__main__":
    sys.exit(main())
