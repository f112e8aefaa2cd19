"""Times of several functions, in turns.

A round runs every function once, in an order that rotates, so that all see the same machine. On
CUDA a run is timed by two events, after the L2 cache was overwritten; on a CPU by `perf_counter`.
Runs before the first round are not counted.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Functions = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    warmup: int = 1
    """Untimed runs of each function before the first round."""
    rounds: int = 10
    least: int = 3
    """Rounds that are run even when the time is up."""
    seconds: float = 60.0
    """No further round begins after so many."""


def interleaved(functions: Functions, plan: Plan, device: str) -> dict[str, list[float]]:
    """Seconds of each function in each round; all lists have the same length."""
    for function in functions.values():
        for _ in range(plan.warmup):
            function()
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    clock = _CudaClock() if device == "cuda" else _CpuClock()
    start = time.monotonic()
    for done in range(plan.rounds):
        if done >= plan.least and time.monotonic() - start > plan.seconds:
            break
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(clock(functions[name]))
    return seconds


class _CpuClock:
    def __call__(self, function: Callable[[], object]) -> float:
        gc.disable()
        try:
            start = time.perf_counter()
            result = function()
            end = time.perf_counter()
        finally:
            gc.enable()
        del result
        return end - start


class _CudaClock:
    """Events around one run. Launch overhead counts if the GPU waits for the host."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = getattr(properties, "L2_cache_size", 0) or (64 << 20)
        self._flush: Tensor = torch.empty(2 * cache, dtype=torch.int8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, function: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        self._flush.zero_()
        self._start.record()
        result = function()
        self._end.record()
        torch.cuda.synchronize()
        del result
        return self._start.elapsed_time(self._end) / 1e3


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """(median, p20, p80)."""
    ordered = sorted(seconds)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return statistics.median(ordered), at(0.2), at(0.8)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Steps of OISD and of GRPO that took turns: medians, and the spread of the pairs' ratios."""
    ratio, p20, p80 = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    found = {"oisd_s": statistics.median(ours), "grpo_s": statistics.median(theirs)}
    return found | {"ratio": ratio, "ratio_p20": p20, "ratio_p80": p80, "steps": len(ours)}
