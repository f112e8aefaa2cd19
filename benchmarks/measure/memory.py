"""Peak memory of one run, beyond what its inputs take.

On CUDA: the allocator's peak less what was allocated before. On a CPU: peak resident memory (VmHWM,
reset first) less resident memory before, in a process of its own. It is forked from a server that
has imported everything and computed nothing, so that memory freed by earlier work hides no peak.
Outputs and gradients count. The inputs count, too, if a case says `whole`.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

MIB = 2**20
PRELOAD = ["benchmarks.measure.preload"]


class MemoryFailure(RuntimeError):
    """The process that measures could not finish; says why."""


def available() -> float:
    """Free bytes of memory, infinite if that is not known."""
    try:
        return 1024 * _field("/proc/meminfo", "MemAvailable")
    except (OSError, ValueError):
        return float("inf")


def cuda_peak(run: Callable[[], object], whole: bool) -> float:
    """MiB at the peak of a run on the current CUDA device."""
    gc.collect()
    torch.cuda.synchronize()
    before = 0 if whole else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / MIB


def cpu_peak(case: str, implementation: str, threads: int, timeout: float) -> float:
    """MiB at the peak of a run in a fresh process.

    Raises MemoryFailure when the process does not finish: killed for memory, say.
    """
    if not sys.platform.startswith("linux"):
        raise MemoryFailure("peak resident memory is read from /proc, which only Linux has")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(theirs, case, implementation, threads), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not mine.poll(timeout):
            process.kill()
            raise MemoryFailure(f"no result after {timeout:.0f} s")
        found = mine.recv()
    except EOFError:
        process.join()
        cause = ", killed, perhaps because memory ran out" if process.exitcode == -9 else ""
        raise MemoryFailure(f"the process ended with {process.exitcode}{cause}") from None
    process.join()
    if isinstance(found, str):
        raise MemoryFailure(found)
    return found


def _measure(pipe: Connection, case: str, implementation: str, threads: int) -> None:
    try:
        pipe.send(_peak(case, implementation, threads))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _peak(case: str, implementation: str, threads: int) -> float:
    from benchmarks.cases.suite import all_cases  # with the trainer, which imports transformers

    torch.set_num_threads(threads)
    found = next(c for c in all_cases("cpu") if c.name == case)
    chosen = next(i for i in found.implementations if i.name == implementation)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the matmul library's own buffers
    touch_libraries()
    before = _resident()
    run = chosen.make(found.inputs())
    gc.collect()
    inputs = _resident() - before if found.whole else 0.0
    return inputs / MIB + resident_peak(run)


def resident_peak(run: Callable[[], object]) -> float:
    """MiB of resident memory at the peak of a run in this process, less what was there before."""
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    result = run()
    peak = 1024 * _field("/proc/self/status", "VmHWM")
    del result
    return (peak - before) / MIB


def touch_libraries() -> None:
    """Map every page of the loaded libraries: otherwise code that a run is the first to reach would
    count as its memory, a hundred MiB of it."""
    populate = 22  # MADV_POPULATE_READ, Linux 5.14; older kernels refuse it, which is harmless
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and fields[1].startswith("r"):
            start, end = (int(x, 16) for x in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), populate)


def _resident() -> float:
    return _field("/proc/self/status", "VmRSS") * 1024


def _field(path: str, name: str) -> int:
    """A number of kB from one of /proc's tables."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} has no {name}")
    return int(match[1])
