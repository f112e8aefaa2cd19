"""How long the phases of a step take."""

from __future__ import annotations

import time


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
