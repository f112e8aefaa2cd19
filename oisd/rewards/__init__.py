r"""Rewards for rollouts: verifiable mathematics, strings, or the user's own function.

A mathematics reward grades the last `\boxed{...}` of a completion against a gold answer:

1. `oisd.rewards.reading` reads both answers as a careful human reads them (numbers, quantities,
   points, sets, intervals, equations, choices, words), and `oisd.rewards.verdicts` compares them
   exactly, in fractions or in as many digits as it takes;
2. what only computer algebra can evaluate (limits, integrals, gigantic powers) goes to math-verify
   and sympy in a pool of worker processes.

The reward `boxed_string` compares the same box as strings only, see `oisd.rewards.answers`.

Processes, not threads, because sympy can spend hours on `9^{9^{9}}`: a worker that overruns its
deadline is killed, the answer earns 0.0 and is counted. Workers are spawned, never forked (torch's
threads do not survive a fork), and import neither torch nor the caller's main module; so this
package imports only the standard library, pebble and, where a value is irrational, mpmath.

Partial credit and format rewards are left out on purpose. Write your own function for them and
name it `module:function`, see `load_reward`.
"""

import difflib
import json
import math

from oisd.rewards.answers import last_boxed, same_string
from oisd.rewards.function import RewardError, RewardFunction, check_batch
from oisd.rewards.grading import MAX_BOX_CHARACTERS, MathReward
from oisd.rewards.reasoning import NAME as REASONING_GYM
from oisd.rewards.reasoning import ReasoningGymReward, check_options, is_reasoning_reward
from oisd.rewards.steps import CountdownReward, FinalReward, countdown_reward, final_reward
from oisd.rewards.user import UserReward

__all__ = [
    "MAX_BOX_CHARACTERS",
    "BoxedStringReward",
    "CountdownReward",
    "ExactReward",
    "FinalReward",
    "MathReward",
    "ReasoningGymReward",
    "RewardError",
    "RewardFunction",
    "UserReward",
    "boxed_string_reward",
    "check_answers",
    "check_reward",
    "countdown_reward",
    "exact_reward",
    "final_reward",
    "last_boxed",
    "load_reward",
    "math_reward",
]


class BoxedStringReward(RewardFunction):
    """Grades the last box as a string, see `boxed_string_reward`."""

    name = "boxed_string"

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        return boxed_string_reward(completions, answers)


class ExactReward(RewardFunction):
    """Grades by equality of strings, see `exact_reward`."""

    name = "exact"

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        return exact_reward(completions, answers)


_MATH = "math", "math_verify"
_OWN = {
    reward.name: reward for reward in (BoxedStringReward, ExactReward, FinalReward, CountdownReward)
}

_shared: MathReward | None = None


def _shared_math() -> MathReward:
    global _shared
    _shared = _shared or MathReward()
    return _shared


def math_reward(completions: list[str], answers: list[str]) -> list[float]:
    r"""1.0 where the last `\boxed{}` of a completion equals the gold answer, else 0.0.

    completions: texts of any length; no box, or one of 2,000 characters or more, earns 0.0.
    answers: one gold answer each, without `\boxed{}`; one that cannot be parsed warns, see
        `check_answers`.

    Grades in a shared pool of workers, 5 s per answer; use `MathReward` to choose, or to count
    timeouts.
    Raises ValueError for lists of different lengths and for anything but strings in them.
    """
    return _shared_math()(completions, answers)


def check_answers(answers: list[str]) -> list[str]:
    """One line for each distinct gold answer that does not grade as equal to itself.

    answers: gold answers, as for `math_reward`. If math-verify cannot parse one, only the same
    string earns a reward, and everything else silently earns 0.0: read the list before training.
    """
    return _shared_math().check_answers(answers)


def boxed_string_reward(completions: list[str], answers: list[str]) -> list[float]:
    r"""1.0 where the last `\boxed{}` has the same normal form as the gold answer, else 0.0.

    Stricter than `math_reward` (0.25 is not 1/4), never slow, and the way many published results
    are graded; the rules are those of `oisd.rewards.answers.normal_form`.

    Raises ValueError for lists of different lengths and for anything but strings in them.
    """
    check_batch("boxed_string_reward", completions, answers)
    boxes = map(last_boxed, completions)
    return [
        float(box is not None and same_string(box, gold))
        for box, gold in zip(boxes, answers, strict=True)
    ]


def exact_reward(completions: list[str], answers: list[str]) -> list[float]:
    """1.0 where the completion equals the answer, apart from surrounding white space, else 0.0.

    Raises ValueError for lists of different lengths and for anything but strings in them.
    """
    check_batch("exact_reward", completions, answers)
    return [float(c.strip() == a.strip()) for c, a in zip(completions, answers, strict=True)]


def load_reward(name: str, timeout_s: float = 5.0) -> RewardFunction:
    """The reward function of this name: `(completions, answers) -> one float each`.

    name: "math" (or "math_verify"), "boxed_string", "exact", "final" (what follows the last "="),
        "countdown" (its steps), "reasoning-gym" (the task's own grader, with options as in
        `oisd.rewards.reasoning`), or "module:function" of your own, importable from the current
        directory; it runs in its own worker process and must return one finite number per
        completion.
    timeout_s: seconds, > 0: for "math" per answer, which then earns 0.0; for your own function per
        batch (importing its module, up to 60 s, does not count).

    Raises ValueError if there is no such function. Calls of your own function raise `RewardError`
    if it raises, takes too long, or returns anything else.
    """
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"load_reward: timeout_s must be positive and finite, got {timeout_s}")
    check_reward(name)
    if name in _MATH:
        return MathReward(timeout_s)
    if is_reasoning_reward(name):
        return ReasoningGymReward(name, timeout_s)
    return _OWN[name]() if name in _OWN else UserReward(name, timeout_s)


def fitting_rewards(completions: list[str], answers: list[str]) -> list[str]:
    """Names of those of our rewards that compare strings and give all of these 1."""
    return [name for name, kind in _OWN.items() if min(kind()(completions, answers)) == 1]


def check_reward(name: str) -> None:
    """Raise ValueError for a name that `load_reward` does not know; imports no module of yours."""
    if is_reasoning_reward(name):
        check_options(name)
        return
    known = [*_MATH, *_OWN, REASONING_GYM]
    module, _, function = name.partition(":")
    if name in known or (module and function):
        return
    meant = difflib.get_close_matches(module, known, n=1, cutoff=0.6)
    raise ValueError(
        f'load_reward: wanted "math", {", ".join(json.dumps(own) for own in _OWN)}, '
        f'"reasoning-gym" or "module:function", got {name!r}'
        + (f"; did you mean {meant[0]!r}?" if meant else "")
    )
