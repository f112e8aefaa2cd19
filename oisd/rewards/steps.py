"""Graders of worked solutions: the number at their end, or every step of a countdown."""

from __future__ import annotations

import re

from oisd.rewards.function import RewardFunction, check_batch

_STEP = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})")


class FinalReward(RewardFunction):
    """Grades what follows the last `=`, see `final_reward`."""

    name = "final"

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        return final_reward(completions, answers)


class CountdownReward(RewardFunction):
    """Grades the steps of a countdown, see `countdown_reward`."""

    name = "countdown"

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        return countdown_reward(completions, answers)


def final_reward(completions: list[str], answers: list[str]) -> list[float]:
    """1.0 where what follows the last `=` of a completion equals the answer, else 0.0.

    A completion without `=` counts as a whole; white space around either does not matter.
    Raises ValueError for lists of different lengths and for anything but strings in them.
    """
    check_batch("final_reward", completions, answers)
    pairs = zip(completions, answers, strict=True)
    return [float(c.rpartition("=")[2].strip() == answer.strip()) for c, answer in pairs]


def countdown_reward(completions: list[str], answers: list[str]) -> list[float]:
    """1.0 where the steps of a completion lead from the given numbers to the target, else 0.0.

    completions: steps like `25*3=75,75+7=82`. Each takes two numbers that were given, or found by
        an earlier step, and not used since. Its result must be right, whole and not negative.
    answers: `3 7 25:82`, the numbers and the target, which the last step must reach. Not all of the
        numbers need be used.
    Raises ValueError for lists of different lengths and for anything but strings in them.
    """
    check_batch("countdown_reward", completions, answers)
    return [float(_reaches(c, a)) for c, a in zip(completions, answers, strict=True)]


def _reaches(completion: str, problem: str) -> bool:
    given, _, target = problem.partition(":")
    left = [int(number) for number in given.split()]
    result = None
    for text in completion.strip().split(","):
        step = _STEP.fullmatch(text.strip())
        if step is None:
            return False
        a, b, result = int(step[1]), int(step[3]), int(step[4])
        for number in (a, b):
            if number not in left:
                return False
            left.remove(number)
        if not _is_right(a, step[2], b, result):
            return False
        left.append(result)
    return result == int(target)


def _is_right(a: int, sign: str, b: int, result: int) -> bool:
    if sign == "/":
        return b != 0 and b * result == a
    return result == {"+": a + b, "-": a - b, "*": a * b}[sign]
