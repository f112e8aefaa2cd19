"""The `math` reward: the last box of each completion against a gold answer."""

import os
import warnings
from typing import Any

from pebble import ProcessExpired

from oisd.rewards import algebra
from oisd.rewards.answers import last_boxed
from oisd.rewards.function import RewardError, RewardFunction, check_batch
from oisd.rewards.reading import read
from oisd.rewards.reading.spelling import tidy
from oisd.rewards.verdicts import is_readable, key, verdict
from oisd.rewards.workers import Workers, WorkersError

MAX_BOX_CHARACTERS = 2000  # a box as long as this earns 0.0 unread: no answer is, sympy is slow


class MathReward(RewardFunction):
    """Grades the last box of each completion, see `math_reward`.

    timeout_s: seconds to grade one answer, > 0; wall clock, so allow for a busy machine.
    workers: processes, >= 1; by default half of the cores, from 2 to 8.
    """

    name = "math"

    def __init__(self, timeout_s: float = 5.0, workers: int | None = None) -> None:
        super().__init__()
        self.timeout_s = timeout_s
        count = workers or min(8, max(2, (os.cpu_count() or 1) // 2))
        self._workers = Workers(count, algebra.start_worker)

    def start(self) -> None:
        """Start the workers without waiting for them; the trainer samples meanwhile."""
        import mpmath  # noqa: F401

        self._workers.start()

    def _ask_workers(self, pairs: list[tuple[str, str]]) -> list[Any]:
        tasks = [(answer, gold, self.timeout_s) for answer, gold in pairs]
        try:
            return self._workers.run(algebra.verify, tasks, self.timeout_s) if tasks else []
        except WorkersError as error:
            raise RewardError(self.name, str(error)) from None

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        check_batch("math_reward", completions, answers)
        rewards = [0.0] * len(completions)
        same: dict[tuple[str, str], list[int]] = {}
        for i, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            box = last_boxed(completion)
            if box is not None and len(box) < MAX_BOX_CHARACTERS:
                same.setdefault((box.strip(), answer), []).append(i)
        verdicts = {pair: _verdict(*pair) for pair in same}
        undecided = [pair for pair, right in verdicts.items() if right is None]
        verdicts |= zip(undecided, self._ask_workers(undecided), strict=True)
        for pair, right in verdicts.items():
            if isinstance(right, TimeoutError | ProcessExpired):
                self.timeouts += len(same[pair])
            elif right is None:
                warnings.warn(f"math_reward: {_unparsable(pair[1])}", stacklevel=2)
            else:
                for i in same[pair]:
                    rewards[i] = float(right)
        return rewards

    def check_answers(self, answers: list[str]) -> list[str]:
        """See the function `check_answers`."""
        check_batch("check_answers", answers, answers)
        first: dict[str, int] = {}
        for i, answer in enumerate(answers):
            first.setdefault(answer if len(answer) >= MAX_BOX_CHARACTERS else key(answer), i)
        short = [answers[i] for gold, i in first.items() if 0 < len(gold) < MAX_BOX_CHARACTERS]
        asked = [(gold, gold) for gold in short if not is_readable(gold)]
        found = dict(zip(asked, self._ask_workers(asked), strict=True))
        problems: list[str] = []
        for gold, i in first.items():
            right = found.get((answers[i], answers[i]), True)
            if not gold:
                problems.append(f"answers[{i}]: gold answer {answers[i]!r} is empty")
            elif len(gold) >= MAX_BOX_CHARACTERS:
                problems.append(f"answers[{i}]: gold answer {gold[:40]!r}... is too long")
            elif right is None:
                problems.append(f"answers[{i}]: {_unparsable(answers[i])}")
            elif right is not True:
                problems.append(f"answers[{i}]: {gold!r} does not grade as itself: {right!r}")
        return problems

    def close(self) -> None:
        self._workers.close()


def forget() -> None:
    """Drop what is remembered of answers seen, for measurements."""
    for remembered in (verdict, read, tidy, key, is_readable):
        remembered.cache_clear()


def _verdict(answer: str, gold: str) -> Any:
    try:
        return verdict(answer, gold)
    except Exception as error:  # a defect of the reader, which must not end a run of days
        warnings.warn(
            f"math_reward: {answer!r} against {gold!r} raised {error!r} and earns 0; please report",
            stacklevel=3,
        )
        return False


def _unparsable(gold: str) -> str:
    return f"gold answer {gold!r} cannot be parsed; only the same string will earn a reward"
