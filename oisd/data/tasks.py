"""Built-in tasks with worked solutions, of any number of problems and any difficulty.

A problem is a function of (seed, index) alone. Whether it belongs to the training or to the test
problems depends on the problem itself, so the two never overlap, whatever their seeds and settings.

| task | prompt | worked solution |
|---|---|---|
| multiplication | `347*28=` | `6772+04960=61790`: partial products, then their sum |
| running_sum | `047+085+012=` | `231=441`: the sum after each term |
| modular | `7*5+3*8%9=` | `8=2=7`: from left to right, each step modulo 9 |
| countdown | `3 7 25:82=` | `25*3=75,75+7=82`: steps from the numbers to the target, here 82 |
| base | `347:7=` | `049r4,007r0,001r0,000r1=1004`: quotients and remainders, then the digits |

Products and sums have their digits reversed, least significant first, so that each digit depends on
what stands before it. Numbers have leading zeros where others of their kind are longer: what a step
reads is then always at the same distance, which a small model learns much faster. The answer is
what follows the last `=`, except in countdown, which has many right solutions; the rewards "final"
and "countdown" grade them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from oisd.data.examples import DataError, Example, check_split
from oisd.schema import whole_numbers

# Of training and test problems together that are new; beyond it a task counts as exhausted.
_PATIENCE = 2_000
_DEFAULT_LIMIT = 20_000
_TEST_SHARE = 10  # one problem in so many is a test problem


class Draw:
    """Random numbers of one problem: the same for (seed, index) on every machine."""

    def __init__(self, seed: int, index: int) -> None:
        # Python promises the stream of `random()` alone for all its versions.
        self._random = random.Random(f"{seed}/{index}").random

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def of_digits(self, digits: int) -> int:
        """A number of that many decimal digits; 0 counts as having one."""
        return self.between(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


class Problem(NamedTuple):
    """A prompt with its worked solution; key: equal for problems that differ in order only."""

    prompt: str
    solution: str
    answer: str
    key: str


class Task(NamedTuple):
    """How a task's problems are drawn, and its settings: (default, least, most)."""

    draw: Callable[..., Problem]
    settings: dict[str, tuple[int, int, int]]


def _reversed(number: int, width: int) -> str:
    return f"{number:0{width}}"[::-1]


def _multiplication(draw: Draw, digits: int, by: int) -> Problem:
    a, b = draw.of_digits(digits), draw.of_digits(by)
    partial = [
        "0" * place + _reversed(a * int(digit), digits + 1)
        for place, digit in enumerate(reversed(str(b)))
    ]
    answer = _reversed(a * b, digits + by)
    solution = "+".join(partial) + f"={answer}" if by > 1 else answer
    return Problem(f"{a}*{b}=", solution, answer, f"{min(a, b)}*{max(a, b)}")


def _running_sum(draw: Draw, terms: int, digits: int) -> Problem:
    numbers = [draw.of_digits(digits) for _ in range(terms)]
    width = len(str(terms * (10**digits - 1)))
    sums = [_reversed(sum(numbers[: n + 1]), width) for n in range(1, terms)]
    prompt = "+".join(f"{number:0{width}}" for number in numbers) + "="
    return Problem(prompt, "=".join(sums), sums[-1], prompt)


def _modular(draw: Draw, terms: int, modulus: int) -> Problem:
    width = len(str(modulus - 1))
    value = draw.between(0, modulus - 1)
    text, steps = f"{value:0{width}}", []
    for _ in range(terms - 1):
        sign = "+-*"[draw.between(0, 2)]
        # Times 0 would make everything before it irrelevant.
        number = draw.between(1 if sign == "*" else 0, modulus - 1)
        text += f"{sign}{number:0{width}}"
        value = (value + number, value - number, value * number)["+-*".index(sign)] % modulus
        steps.append(f"{value:0{width}}")
    prompt = f"{text}%{modulus}="
    return Problem(prompt, "=".join(steps), steps[-1], prompt)


def _countdown(draw: Draw, numbers: int, largest: int, limit: int) -> Problem:
    given = [draw.between(1, largest) for _ in range(numbers)]
    left, steps = [*given], []
    while len(left) > 1:
        a = left.pop(draw.between(0, len(left) - 1))
        b = left.pop(draw.between(0, len(left) - 1))
        a, b = max(a, b), min(a, b)
        found = [(f"{a}+{b}", a + b)] if a + b <= limit else []
        found += [(f"{a}-{b}", a - b)] if a > b else []
        found += [(f"{a}*{b}", a * b)] if 1 < b and a * b <= limit else []
        if not found:  # two equal numbers whose sum is over the limit
            return _countdown(draw, numbers, largest, limit)
        text, value = found[draw.between(0, len(found) - 1)]
        steps.append(f"{text}={value}")
        left.append(value)
    problem = f"{' '.join(map(str, given))}:{left[0]}"
    key = f"{sorted(given)}:{left[0]}"
    return Problem(f"{problem}=", ",".join(steps), problem, key)


def _base(draw: Draw, digits: int, base: int) -> Problem:
    number = left = draw.of_digits(digits)
    steps, found = [], ""
    while True:
        left, remainder = divmod(left, base)
        steps.append(f"{left:0{digits}}r{remainder}")
        found = str(remainder) + found
        if not left:
            break
    prompt = f"{number}:{base}="
    return Problem(prompt, ",".join(steps) + f"={found}", found, prompt)


TASKS = {
    "multiplication": Task(_multiplication, {"digits": (3, 1, 9), "by": (2, 1, 9)}),
    "running_sum": Task(_running_sum, {"terms": (6, 2, 50), "digits": (2, 1, 9)}),
    "modular": Task(_modular, {"terms": (5, 2, 50), "modulus": (11, 2, 99)}),
    "countdown": Task(
        _countdown, {"numbers": (3, 2, 8), "largest": (20, 2, 999), "limit": (99, 4, 9999)}
    ),
    "base": Task(_base, {"digits": (3, 1, 9), "base": (7, 2, 9)}),
}


def is_task(source: str) -> bool:
    """Whether a data source names a built-in task with worked solutions."""
    return source.partition(":")[0] in TASKS


def task_settings(source: str, split: str) -> dict[str, int]:
    """The settings of a source, see `task_examples`, which raises the same errors."""
    name, _, text = source.partition(":")
    task = TASKS[name]
    defaults = {key: default for key, (default, _, _) in task.settings.items()}
    try:
        settings = whole_numbers(source, text, defaults)
    except ValueError as error:
        raise DataError(str(error)) from None
    for key, (_, least, most) in task.settings.items():
        if not least <= settings[key] <= most:
            raise DataError(f"{source}: {key} must lie in {least} to {most}, got {settings[key]}")
    if name == "countdown" and settings["limit"] < settings["largest"]:
        raise DataError(
            f"{source}: limit must be at least largest = {settings['largest']}, got "
            f"{settings['limit']}"
        )
    check_split(source, split)
    return settings


def task_examples(
    source: str, *, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Problems of a built-in task without repetition, in the order that `seed` draws them.

    source: "multiplication", or "multiplication:digits=3,by=3" with settings of `TASKS`.
    split: "train" or "test", a fixed tenth of all problems.
    limit: number of problems; None: 20,000. All that there are, where a task has fewer.
    Raises DataError for an unknown setting, a value out of its range, and another split.
    """
    settings = task_settings(source, split)
    name = source.partition(":")[0]
    task = TASKS[name]
    examples: list[Example] = []
    seen: set[str] = set()
    last_new = 0
    for index in count():
        problem = task.draw(Draw(seed, index), **settings)
        if problem.key not in seen:
            seen.add(problem.key)
            last_new = index
            if is_test(f"{name} {problem.key}") == (split == "test"):
                name_of = problem.prompt.removesuffix("=")
                examples.append(Example(problem.prompt, problem.answer, name_of, problem.solution))
        if len(examples) >= (limit or _DEFAULT_LIMIT) or index - last_new > _PATIENCE:
            break
    if not examples:
        raise DataError(f"{source}: no problem of its few is in the split {split!r}")
    return examples


def is_test(problem: str) -> bool:
    """Whether a problem belongs to the fixed tenth that is held out."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % _TEST_SHARE == 0
