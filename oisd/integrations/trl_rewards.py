"""Graders with the signature of TRL's reward functions: of mathematics, of reasoning-gym's tasks.

Imports nothing of TRL, so that a worker that is sent the function starts fast.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from oisd.rewards import MathReward, ReasoningGymReward, last_boxed

_COLUMNS = "solution", "answer"  # of gold answers, the first that there is


def math_reward(
    completions: Sequence[Any],
    *,
    prompts: Sequence[Any] | None = None,
    column: str | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""`oisd.rewards.math_reward` as a reward function of TRL: `reward_funcs=math_reward`.

    1.0 where the last `\boxed{}` of a completion equals the gold answer, 0.0 where it does not, and
    None, by which TRL leaves a completion out, where the gold answer is None, NaN or unreadable.

    completions: texts, or lists of messages, of which the assistant's last one is graded.
    prompts: not used.
    column: name of the column of gold answers, as in `functools.partial(math_reward,
        column="final_answer")`; by default "solution", else "answer".
    log_metric: TRL's; gets frac_gold, the share of completions that have a gold answer, and
        frac_timeouts, the share of those whose grading took too long.
    columns: the data set's columns, one value a completion. A gold answer is a string, of which the
        last box counts if it has one, or a number.

    Grades in a pool of workers of each process, 5 s per answer. Raises ValueError for a column that
    is missing, lists of different lengths, and anything that is neither text nor messages.
    """
    golds = _golds(columns, column)
    if isinstance(completions, str) or not isinstance(completions, Sequence):
        got = "a string" if isinstance(completions, str) else type(completions).__name__
    else:
        got = f"{len(completions)} of them"
    if got != f"{len(golds)} of them":
        raise ValueError(
            f"math_reward: completions must be a list as long as that of gold answers, "
            f"{len(golds)}, got {got}"
        )
    texts = [_text(completion, i) for i, completion in enumerate(completions)]
    answers = [_answer(gold, i) for i, gold in enumerate(golds)]
    chosen = [i for i, gold in enumerate(answers) if gold is not None and _is_readable(gold)]
    grader = _grader()
    before = grader.timeouts
    found = grader([texts[i] for i in chosen], [answers[i] or "" for i in chosen])
    if log_metric is not None and texts:
        log_metric("frac_gold", len(chosen) / len(texts))
        if chosen:
            log_metric("frac_timeouts", (grader.timeouts - before) / len(chosen))
    rewards: list[float | None] = [None] * len(texts)
    for i, reward in zip(chosen, found, strict=True):
        rewards[i] = reward
    return rewards


def reasoning_gym_reward(
    completions: Sequence[Any],
    *,
    answer: Sequence[str],
    options: str = "",
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    r"""The graders of reasoning-gym's tasks as a reward function of TRL.

    completions: texts, or lists of messages, of which the assistant's last one is graded.
    answer: the data set's column "answer", with those of `oisd.data.load_examples` for a source
        "reasoning-gym:...".
    options: "shaped", "whole" or "whole+shaped" (`oisd.rewards.reasoning`), as in
        `functools.partial(reasoning_gym_reward, options="shaped")`; by default 1.0 where the last
        `\boxed{}` is right, else 0.0.
    log_metric: TRL's; gets frac_timeouts, the share of completions whose grading took too long.
    columns: not used.

    Grades in a pool of workers of each process, 5 s per answer. Raises ValueError for lists of
    different lengths and where reasoning-gym is not installed, RewardError for other answers.
    """
    grader = _reasoning_grader(f"reasoning-gym:{options}" if options else "reasoning-gym")
    before = grader.timeouts
    texts = [_text(completion, i) for i, completion in enumerate(completions)]
    rewards = grader(texts, list(answer))
    if log_metric is not None and texts:
        log_metric("frac_timeouts", (grader.timeouts - before) / len(texts))
    return rewards


@cache
def _reasoning_grader(name: str) -> ReasoningGymReward:
    return ReasoningGymReward(name)


@cache
def _grader() -> MathReward:
    return MathReward()


@cache
def _is_readable(gold: str) -> bool:
    """Whether anything but the same string could equal it; warns, once for each, if not."""
    problems = _grader().check_answers([gold])
    for problem in problems:
        text = problem.partition(": ")[2]
        warnings.warn(f"math_reward: {text}: left out, its reward is None", stacklevel=3)
    return not problems


def _golds(columns: Mapping[str, Any], column: str | None) -> Sequence[Any]:
    names = _COLUMNS if column is None else (column,)
    for name in names:
        if (golds := columns.get(name)) is not None:
            if isinstance(golds, str) or not isinstance(golds, Sequence):
                raise ValueError(
                    f"math_reward: column {name!r} must be a list of gold answers, got "
                    f"{type(golds).__name__}"
                )
            return golds
    of_trl = "completion_ids"
    given = [n for n, values in columns.items() if isinstance(values, list) and n != of_trl]
    wanted = " or ".join(map(repr, names))
    raise ValueError(
        f"math_reward: the data must have a column {wanted} of gold answers, got {sorted(given)}; "
        'for another one pass functools.partial(math_reward, column="its name")'
    )


def _text(completion: Any, index: int) -> str:
    """What is graded of a completion."""
    if isinstance(completion, str):
        return completion
    try:
        said = [m["content"] for m in completion if m.get("role", "assistant") == "assistant"]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            f"math_reward: completions[{index}] must be a string or a list of messages with "
            f'"role" and "content", got {type(completion).__name__}'
        ) from None
    content = said[-1] if said else ""
    if isinstance(content, list):  # of parts, as multimodal templates have them
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if wrong := [part for part in parts if not isinstance(part, str | None)]:
            raise ValueError(
                f"math_reward: completions[{index}] must have parts with a text, got "
                f"{type(wrong[0]).__name__}"
            )
        return "".join(part or "" for part in parts)
    return content or ""  # a message that only calls tools has none


def _answer(gold: Any, index: int) -> str | None:
    if gold is None or (isinstance(gold, float) and math.isnan(gold)):  # pandas' None
        return None
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise ValueError(
            f"math_reward: gold answer {index} must be a string, a number or None, got "
            f"{type(gold).__name__}"
        )
    text = str(gold)
    box = last_boxed(text)
    return text if box is None else box
