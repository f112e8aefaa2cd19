r"""The graders of reasoning-gym's tasks, as a reward: `score_answer` of the task itself.

    reasoning-gym                1 where the last \boxed{} scores 1, else 0
    reasoning-gym:shaped         the score of the last box itself, in [0, 1]
    reasoning-gym:whole          the whole completion in place of the box
    reasoning-gym:whole+shaped   both

Scores are exact by default, because the tasks differ in what they give for less: for a right answer
within a sentence many give its share of the sentence's length, and some 0.01 for anything at all. A
completion without a box earns 0, and no task is asked.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import warnings
from functools import cache
from typing import Any

from pebble import ProcessExpired

from oisd.rewards.answers import last_boxed
from oisd.rewards.function import RewardError, RewardFunction, check_batch
from oisd.rewards.workers import Workers, WorkersError
from oisd.schema import nearest

NAME = "reasoning-gym"
_OPTIONS = ("whole", "shaped")
_FIELDS = ("answer", "task", "settings", "question", "metadata")


def is_reasoning_reward(name: str) -> bool:
    """Whether a reward's name is one of the module's."""
    return name.partition(":")[0] == NAME


def check_options(name: str) -> list[str]:
    """The options in a reward's name, see the module. Raises ValueError for any other."""
    options = name.partition(":")[2].split("+") if ":" in name else []
    unknown = [option for option in options if option not in _OPTIONS]
    if unknown or not is_reasoning_reward(name):
        raise ValueError(
            f'wanted "{NAME}", "{NAME}:shaped", "{NAME}:whole" or "{NAME}:whole+shaped", got '
            f"{name!r}{nearest(unknown[0], _OPTIONS) if unknown else ''}"
        )
    return options


# ---- inside the worker -----------------------------------------------------------------------


def _start_worker() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import reasoning_gym  # noqa: F401  # pyright: ignore


@cache
def _grader(task: str, settings: str) -> Any:
    """The task with its settings, of which some graders read their bounds."""
    from reasoning_gym.factory import DATASETS, create_dataset  # pyright: ignore

    given = json.loads(settings)
    defaults = {name: getattr(DATASETS[task][1], name, None) for name in given}
    as_tuples = {
        name: tuple(value) if isinstance(defaults[name], tuple) else value
        for name, value in given.items()
    }
    return create_dataset(task, seed=0, size=20, **as_tuples)


def _score(text: str, answer: str) -> float | str:
    """The task's score, or why there is none."""
    record = json.loads(answer)
    try:
        grader = _grader(record["task"], json.dumps(record["settings"], sort_keys=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        score = float(grader.score_answer(text, record))
    except Exception:  # the grader's own trouble with what a model wrote
        return math.nan
    return score


# ---- in the process that asks ----------------------------------------------------------------


class ReasoningGymReward(RewardFunction):
    """Grades answers to problems of `data.source = "reasoning-gym:..."`, see the module.

    name: as in the module.
    timeout_s: seconds to grade one answer, > 0; one that takes longer earns 0.0 and is counted.
    workers: processes, >= 1; by default half of the cores, from 2 to 8.
    Raises ValueError for an unknown option, and where reasoning-gym is not installed.
    """

    def __init__(self, name: str = NAME, timeout_s: float = 5.0, workers: int | None = None):
        super().__init__()
        options = check_options(name)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(f"{name}: reasoning-gym is not installed; pip install 'oisd[{NAME}]'")
        self.name = name
        self.timeout_s = timeout_s
        self.whole, self.shaped = "whole" in options, "shaped" in options
        count = workers or min(8, max(2, (os.cpu_count() or 1) // 2))
        self._workers = Workers(count, _start_worker)
        self._known: set[str] = set()
        self._warned: set[str] = set()

    def start(self) -> None:
        self._workers.start()

    def close(self) -> None:
        self._workers.close()

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        check_batch(self.name, completions, answers)
        rewards = [0.0] * len(completions)
        same: dict[tuple[str, str], list[int]] = {}
        for i, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            self._require_record(answer, i)
            text = completion if self.whole else last_boxed(completion)
            if text is not None and text.strip():
                same.setdefault((text.strip(), answer), []).append(i)
        try:
            scores = self._workers.run(_score, list(same), self.timeout_s) if same else []
        except WorkersError as error:
            raise RewardError(self.name, str(error)) from None
        for (pair, indices), score in zip(same.items(), scores, strict=True):
            if isinstance(score, TimeoutError | ProcessExpired):
                self.timeouts += len(indices)
                continue
            task = json.loads(pair[1])["task"]
            if isinstance(score, str):
                raise RewardError(self.name, f"{task} cannot be built: {score}", indices[0])
            if not math.isfinite(score):
                self._warn_of(task, pair[0])
                continue
            for i in indices:
                rewards[i] = min(1.0, max(0.0, score)) if self.shaped else float(score == 1.0)
        return rewards

    def _require_record(self, answer: str, index: int) -> None:
        if answer in self._known:
            return
        try:
            record = json.loads(answer)
        except ValueError:
            record = None
        if not isinstance(record, dict) or any(field not in record for field in _FIELDS):
            raise RewardError(
                self.name,
                f'grades problems of data.source = "{NAME}:...", whose answers are JSON with '
                f"{', '.join(_FIELDS)}; answers[{index}] is {answer[:60]!r}",
                index,
            )
        self._known.add(answer)

    def _warn_of(self, task: str, text: str) -> None:
        if task not in self._warned:
            self._warned.add(task)
            warnings.warn(
                f"{self.name}: the grader of {task} fails on {text[:60]!r}, which earns 0; further "
                "failures of it are not shown",
                stacklevel=3,
            )
