"""A training step of ours beside one of TRL's GRPOTrainer: `benchmarks.trl_throughput`, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.peers.lenses import Absent, Row, load
from benchmarks.peers.page import TRL

STEPS = 20  # timed, in each round
Measure = Callable[[int, int], list[dict[str, Any]]]


def throughput(steps: int, rounds: int) -> list[dict[str, Any]]:
    """Raises Absent."""
    load("trl", "trl")
    from benchmarks import trl_throughput

    return trl_throughput.measure(steps, rounds)


def measure(rounds: int, run: Measure = throughput) -> Iterator[Row]:
    """A row for each trainer; one that sampled from another policy is wrong, and has no times."""
    try:
        rows = run(STEPS, rounds)
    except Absent as absent:
        yield {"part": "step", "trainer": TRL, "absent": str(absent)}
        return
    for row in rows:
        row = {"part": "step", "rounds": rounds, **row}
        if not row["correct"]:
            row["wrong"] = f"reward {row['reward']:.3f}, wanted {row['start_accuracy']:.3f}"
        yield row
