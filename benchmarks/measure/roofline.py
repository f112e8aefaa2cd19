"""The physical limit, measured in the same run: a bare matmul at the case's shapes, and a copy.

The limit of a case is the longer of two times: its least matmul work at the bare matmul's rate, and
its least memory traffic at the copy's bandwidth. `percent` is that limit over the measured time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure.timer import spread


@dataclass(frozen=True)
class Limit:
    """Rates of this machine, from the medians of a run's rounds."""

    flops_per_second: float
    bytes_per_second: float

    @classmethod
    def measured(cls, flops: float, matmul: list[float], copied: float, copy: list[float]) -> Limit:
        return cls(flops / spread(matmul)[0], copied / spread(copy)[0])

    def seconds(self, flops: float, bytes_: float) -> float:
        """The least time that so much work takes."""
        return max(flops / self.flops_per_second, bytes_ / self.bytes_per_second)

    def percent(self, flops: float, bytes_: float, measured: float) -> float:
        return 100 * self.seconds(flops, bytes_) / measured


def copy(device: str) -> tuple[Callable[[], object], float]:
    """A copy of memory far larger than any cache, and the bytes it moves: read and written."""
    count = (1 << 30) if device == "cuda" else (1 << 26)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * count
