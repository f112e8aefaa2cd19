"""The CUDA kernels of csrc/: built beside the other steps, tested by engine, timed where they pass.

Without nvcc, fatbins that were built elsewhere are used: `python -m oisd_kernels.cuda.build` says
where they lie.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases.case import Absent
from benchmarks.cases.shapes import ATTENTIONS
from benchmarks.cuda_kernels import ENGINES, RERUNS, TESTS, pytest_of, sanitizer
from benchmarks.gpu import results
from benchmarks.gpu.worker import Work, Wrong
from benchmarks.measure.machine import ROOT
from oisd_kernels.cuda import build
from oisd_kernels.cuda.build import Unit

NICE = 15  # nvcc must not take the cores from what launches kernels
REHEARSED = ("bfloat16-wide_64-jsd",)


def ordered(units: Sequence[Unit]) -> list[Unit]:
    """bfloat16 first, and of the divergences jsd and none."""

    def rank(unit: Unit) -> tuple[bool, bool]:
        return unit.element != "Bfloat16", unit.divergence not in ("JSD", "NO_DIVERGENCE")

    return sorted(units, key=rank)


def built(unit: Unit) -> str:
    """Build a unit unless it is there.

    Raises Wrong where a kernel uses local memory or its products wait for each other.
    """
    path = build.cache_folder() / f"{unit.name}.fatbin"
    if path.is_file():
        return "there already"
    faults = build.faults(build.build(unit, path))
    if faults:
        raise Wrong(f"local memory or serialized wgmma in {', '.join(f.kernel for f in faults)}")
    return "built"


def compile_units(work: Work) -> None:
    """Every unit, the most wanted first, several at a time, each a check of its own."""
    os.nice(NICE)
    todo = ordered(build.units())
    if work.place.rehearsal:
        todo = [unit for unit in todo if unit.name in REHEARSED]
        built_one = lambda unit: f"{unit.name} would be built"  # noqa: E731  # no minutes of nvcc
    else:
        built_one = built
    folder = build.cache_folder()
    there = [unit for unit in todo if (folder / f"{unit.name}.fatbin").is_file()]
    if build.find_nvcc() is None and not there and not work.place.rehearsal:
        work.check("nvcc", _no_nvcc)
        return
    with ThreadPoolExecutor(max((os.cpu_count() or 2) - 4, 1)) as pool:
        pending = {pool.submit(built_one, unit): unit for unit in todo}
        for done in as_completed(pending):
            work.check(f"unit {pending[done].name}", done.result)


def _no_nvcc() -> str:
    raise Absent(f"no nvcc, and no fatbins in {build.cache_folder()}")


def tests(work: Work, engine: str, more: str = "", options: Sequence[str] = ()) -> None:
    """The tests of an engine, each a row."""
    select = f"{ENGINES[engine]} and not {RERUNS}" if not more else f"{ENGINES[engine]} and {more}"
    run_pytest(work, pytest_of(select, *options))


def run_pytest(work: Work, command: Sequence[str], environment: dict[str, str] | None = None):
    """Run tests in a process of the step; `benchmarks.gpu_tests` writes down each one's end."""
    told = [f"--results={Path(work.task.folder) / results.NAME}", f"--step={work.task.step}"]
    # It ends with the step: it is of the step's process group.
    process = subprocess.Popen(
        [*command, *told], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _paths(), "PYTHONUNBUFFERED": "1", **(environment or {})},
    )  # fmt: skip
    while True:
        try:
            status = process.wait(5)
            break
        except subprocess.TimeoutExpired:
            work.news.send("pytest")  # it has a limit for each test of its own
    ran = {row["verdict"] for row in work.results.rows("test", work.task.step)}
    if work.place.rehearsal and ran <= {results.SKIPPED} and status in (0, 5):
        work.append("check", "tests", results.PASSED, reason="a CPU skips them all")
    elif results.PASSED not in ran:
        work.append("check", "tests", results.FAILED, reason=f"no test passed, status {status}")
    elif status not in (0, 1, 5):  # 5: all had a row before
        work.append("check", "tests", results.FAILED, reason=f"pytest ended with {status}")


def _paths() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


warp_tests = partial(tests, engine="WARP_ENGINE")
warpgroup_tests = partial(tests, engine="WARPGROUP_ENGINE")
specialized_tests = partial(tests, engine="SPECIALIZED_ENGINE")


def times(work: Work) -> None:
    """Each pass by each engine whose tests passed, beside Triton's, SDPA flash and cuDNN."""
    from benchmarks import cuda_times

    if work.place.rehearsal:
        work.append("check", "times", results.PASSED, reason="no engine on a CPU")
        return
    done = work.results.done()
    passed = [e for e in cuda_times.engines() if done.get(f"csrc: tests of {e}") == results.PASSED]
    for model, tokens in cuda_times.CASES:
        if not work.begin(f"{model} {tokens}"):
            continue
        call = cuda_times.Call(ATTENTIONS[model], tokens)
        for kind in cuda_times.MATMULS:
            for found in cuda_times.timed(f"{model} {tokens}", kind, call, passed, seconds=1.0):
                print(found.line, flush=True)
                verdict = results.PASSED if not found.failure else results.WRONG
                work.append("check", f"{model} {tokens} {kind} {found.label}", verdict,
                            reason=found.failure or found.line, median_s=found.median)  # fmt: skip
        del call
        torch.cuda.empty_cache()


def reruns(work: Work) -> None:
    """250 runs, the same bits."""
    engines = "(" + " or ".join(ENGINES.values()) + ")"
    run_pytest(work, pytest_of(f"{engines} and {RERUNS}"))


def memory_checker(work: Work) -> None:
    """Accesses outside of tensors, by compute-sanitizer."""
    tool = sanitizer()
    if tool is None or work.place.rehearsal:
        why = "no compute-sanitizer here" if tool is None else "no GPU"
        work.append("check", "memcheck", results.ABSENT, reason=why)
        return
    engines = "(" + " or ".join(ENGINES.values()) + ")"
    command = [tool, "--tool=memcheck", "--error-exitcode=9"]
    command += pytest_of(f"{engines} and test_against_float64")
    run_pytest(work, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def remaining_tests(work: Work) -> None:
    """The tests that need a GPU and are not of csrc/, one process, each a row."""
    import sys

    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "tests", "-vv",
               "-p", "no:cacheprovider", "--timeout=120", "--timeout-method=thread",
               "--continue-on-collection-errors", "--color=no"]  # fmt: skip
    command += [f"--deselect={path}" for path in TESTS]
    if work.place.rehearsal:  # collecting everything takes half a minute
        command[command.index("tests")] = "tests/oisd_kernels/attention/test_cuda_ops.py"
    run_pytest(work, command)
