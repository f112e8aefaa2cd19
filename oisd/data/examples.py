"""Problems with verifiable answers, and the order in which a run visits them.

The order is a pure function of the step number. A resumed run therefore needs no sampler state: its
position in the data is the step at which it resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """Data that cannot be trained on: names the source, the row, what was wanted and what came."""


class SourceError(DataError):
    """A source, or a setting or split of one, that there is not: nothing was read for it."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A problem: text or a conversation, its answer, and a name that is unique in its set."""

    prompt: str | tuple[Message, ...]
    answer: str
    id: str
    solution: str = ""
    """The completion that a warm-up trains on, where it is not the answer alone."""


def check_split(source: str, split: str) -> None:
    """Raise DataError for a split that a built-in source of problems does not have."""
    if split not in ("train", "test"):
        raise DataError(f'{source}: split must be "train" or "test", got {split!r}')


def prompt_indices(step: int, count: int, num_examples: int, seed: int) -> list[int]:
    """The examples of a training step: `count` indices into `num_examples`, in order.

    Steps count from 0. Each epoch visits every example once, in an order drawn from (seed, epoch);
    a step may cross into the next epoch, and `count` may be larger than `num_examples`.
    """
    if step < 0 or count < 1 or num_examples < 1:
        raise DataError(
            f"prompt_indices: step must be at least 0, count and num_examples at least 1, got "
            f"step={step}, count={count}, num_examples={num_examples}"
        )
    indices: list[int] = []
    position = step * count
    while len(indices) < count:
        epoch, start = divmod(position, num_examples)
        taken = permutation(num_examples, seed, epoch)[start : start + count - len(indices)]
        indices += taken
        position += len(taken)
    return indices


def permutation(size: int, seed: int, stream: int = 0) -> list[int]:
    """A random order of `size` things, the same on every machine and with every NumPy.

    NumPy promises stable streams for its bit generators only, not for `Generator.permutation`;
    hence the sort of raw 64-bit keys.
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, stream))).random_raw(size)
    return np.argsort(keys, kind="stable").tolist()
