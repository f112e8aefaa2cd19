"""Where a queue runs: a GPU at true shapes, or a CPU that rehearses it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases.shapes import ATTENTIONS, HEADS, Attention, Head


@dataclass(frozen=True)
class Place:
    """Device and shapes of a run."""

    device: str
    dtype: torch.dtype
    head: Head
    tokens: int
    """Rows of the lens checks."""
    attention: Attention
    lengths: tuple[int, ...]
    """Of the packed sequences of the attention checks."""
    window: int
    reruns: int
    """Of what must give the same bits each time."""
    rounds: int
    """Of a timing."""
    seconds: float
    """No further round of a timing begins after so many, from the third on."""

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


# Lengths around the tiles' 128 rows. Their sum is no multiple of a tile.
GPU = Place(
    "cuda", torch.bfloat16, HEADS["qwen3-4b"], 96, ATTENTIONS["qwen3-4b"],
    (1, 2, 127, 128, 129, 250), 48, 20, 10, 8.0,
)  # fmt: skip
REHEARSAL = Place("cpu", torch.float32, Head(32, 211), 3, Attention(2, 1, 16), (1, 6), 3, 1, 2, 0.5)


def place(rehearse: bool) -> Place:
    return REHEARSAL if rehearse else GPU
