"""Problems of a task that a CPU can learn: sums of two numbers, the digits of the answer reversed.

The prompt "47+85=" has the answer "231", least significant digit first, so that each digit depends
on one column and one carry.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice

import numpy as np

from oisd.data.examples import DataError, Example, check_split, permutation

# By default all problems of up to two digits are taken, and this many of longer ones.
_DEFAULT_LIMIT = 10_000


def arithmetic_examples(
    digits: int = 2, *, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Problems of the split, in an order drawn by `seed`, without repetition.

    digits: decimal digits of both summands, 1 to 9.
    split: "train" or "test", a fixed tenth of all problems; a+b and b+a are in the same one.
    limit: number of problems; None: all of them up to two digits, 10,000 beyond.
    Raises DataError for digits or a split outside these.
    """
    _check(digits, split)
    if limit is None and digits > 2:
        limit = _DEFAULT_LIMIT
    problems = (
        Example(f"{a}+{b}=", str(a + b)[::-1], f"{a}+{b}")
        for a, b in _summands(digits, seed)
        if _is_test(a, b) == (split == "test")
    )
    return list(islice(problems, limit))


def is_arithmetic(source: str) -> bool:
    """Whether a data source names the sums."""
    return source.partition(":")[0] == "arithmetic"


def check_arithmetic(source: str, split: str) -> int:
    """The digits that a source asks for, "arithmetic" or "arithmetic:digits=2".

    Raises DataError for another way to write it, and for digits or a split that there are not.
    """
    match = re.fullmatch(r"arithmetic(?::digits=(\d+))?", source)
    if match is None:
        raise DataError(
            f'{source}: the built-in task is written "arithmetic" or "arithmetic:digits=2"'
        )
    digits = int(match[1] or 2)
    _check(digits, split)
    return digits


def _check(digits: int, split: str) -> None:
    if not 1 <= digits <= 9:
        raise DataError(f"arithmetic: digits must lie in 1 to 9, got {digits}")
    check_split("arithmetic", split)


def _summands(digits: int, seed: int) -> Iterator[tuple[int, int]]:
    """All pairs of numbers of `digits` digits, in random order; 0 counts as having one digit."""
    low = 0 if digits == 1 else 10 ** (digits - 1)
    count = 10**digits - low
    numbers = permutation(count**2, seed) if digits <= 2 else _distinct(count**2, seed)
    for number in numbers:
        yield low + number // count, low + number % count


def _distinct(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count` without repetition, for a `count` too large to be permuted."""
    stream = np.random.Philox(np.random.SeedSequence(seed))
    seen: set[int] = set()
    while len(seen) < count:
        number = int(stream.random_raw()) % count
        if number not in seen:
            seen.add(number)
            yield number


def _is_test(a: int, b: int) -> bool:
    digest = hashlib.blake2b(f"{min(a, b)}+{max(a, b)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 10 == 0
