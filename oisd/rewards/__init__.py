r"""Rewards for rollouts: verifiable mathematics, strings, or the user's own function.

A mathematics reward grades the last `\boxed{...}` of a completion against a gold answer:

1. as strings, after normalising the LaTeX; words, choice letters and plain integers stop here;
2. otherwise with math-verify, both sides wrapped in `\boxed{}`, in a pool of worker processes.

The reward `boxed_string` compares the same box as strings only, see `oisd.rewards.answers`.

Processes, not threads, because sympy can spend hours on `9^{9^{9}}`: a worker that overruns its
deadline is killed, and the answer earns 0.0 and is counted. Workers import neither torch nor the
caller's main module; so this file imports only the standard library and pebble.

Partial credit and format rewards are left out on purpose. Write your own function for them and
name it `module:function`, see `load_reward`.
"""

import importlib
import logging
import math
import os
import re
import reprlib
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache, partial
from typing import Any

from pebble import ProcessExpired

from oisd.rewards.answers import INTEGER, WORD, clean, compare_strings, key, last_boxed, same_string
from oisd.rewards.workers import Workers, WorkersError

MAX_BOX_CHARACTERS = 2000  # a box this long earns 0.0 unread: no answer is, and sympy is slow
MATH_WORKER_BYTES = 4 << 30  # address space of a grading worker; an idle one uses 0.1 GiB
IMPORT_TIMEOUT_S = 60.0  # for the user's module, which may import torch


class RewardError(RuntimeError):
    """A reward function failed; `index` is that of the first wrong value, if there is one."""

    def __init__(self, function: str, problem: str, index: int | None = None) -> None:
        super().__init__(f"reward {function}: {problem}")
        self.function = function
        self.index = index


# ---- inside a worker -------------------------------------------------------------------------


def _start_math_worker() -> None:
    import math_verify  # noqa: F401  # imported before the first task, whose time is limited

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler waits for sympy's C code
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MATH_WORKER_BYTES, MATH_WORKER_BYTES))


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # Only the box: without one, math-verify would take any fraction it finds in the text.
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    boxed = "\\boxed{" + answer + "}"
    return parse(boxed, [config], "no_fallback", parsing_timeout=None)  # type: ignore[arg-type]


def _verify(answer: str, gold: str, timeout_s: float) -> bool | None:
    """Verdict of math-verify; None: the gold answer parses to nothing."""
    from math_verify import verify

    if hasattr(signal, "setitimer"):  # ends the worker if its parent has died
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
    wanted = _parse(gold)
    verdict = verify(wanted, _parse(answer), timeout_seconds=None) if wanted else None
    # If the question asks for a percentage, "12.5\\%" and "12.5" are the same answer.
    if verdict is False and "%" not in gold and (bare := answer.rstrip("\\% ")) != answer:
        verdict = verify(wanted, _parse(bare), timeout_seconds=None)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    return verdict


def _start_user_worker(directory: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(directory)
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _why(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _find_user(name: str) -> tuple[Any, str | None]:
    """The user's function, and what is wrong with it; SystemExit must not end a worker."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:
        return None, f"cannot import module {module_name!r}:\n{_why(error)}"
    function = getattr(module, attribute, None)
    if function is None:
        return None, f"module {module_name!r} ({module.__file__}) has no attribute {attribute!r}"
    return function, None if callable(function) else f"it is a {type(function).__name__}"


def _check_user(name: str) -> str | None:
    return _find_user(name)[1]


def _call_user(
    name: str, completions: list[str], answers: list[str]
) -> tuple[list[float], str | None, int | None]:
    """Rewards, problem, index of the first wrong value."""
    try:
        values = _find_user(name)[0](completions, answers)
        if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
            return [], f"returned a {type(values).__name__}, wanted a list of numbers", None
        values = list(values)
    except BaseException as error:
        return [], f"raised {type(error).__name__}\n{_why(error)}", None
    if (got := len(values)) != (wanted := len(completions)):
        return [], f"returned {got} values for {wanted} completions", min(got, wanted)
    rewards: list[float] = []
    for index, value in enumerate(values):
        try:
            rewards.append(math.nan if isinstance(value, str | bytes) else float(value))
        except Exception:
            rewards.append(math.nan)
        if not math.isfinite(rewards[-1]):
            got = reprlib.repr(value)
            return [], f"returned {got} at index {index}, wanted a finite number", index
    return rewards, None, None


# ---- reward functions ------------------------------------------------------------------------


def _check_batch(name: str, completions: Sequence[str], answers: Sequence[str]) -> None:
    if len(completions) != len(answers):
        raise ValueError(
            f"{name}: wanted one answer per completion, got {len(completions)} completions "
            f"and {len(answers)} answers"
        )
    for argument, strings in (("completions", completions), ("answers", answers)):
        for i, string in enumerate(strings):
            if not isinstance(string, str):
                got = type(string).__name__
                raise ValueError(f"{name}: {argument}[{i}] must be a string, got {got}")


class RewardFunction:
    """Maps completions and gold answers to rewards.

    name: as given to `load_reward`.
    timeouts: completions that earned 0.0 because grading them took too long or ended their worker
        (for a user's function: batches, which raised).
    """

    name: str

    def __init__(self) -> None:
        self.timeouts = 0

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        """Stop the workers, if any; may be called twice. Grading again starts new ones."""


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
        self._workers = Workers(count, _start_math_worker)

    def _verify(self, pairs: list[tuple[str, str]]) -> list[Any]:
        tasks = [(answer, gold, self.timeout_s) for answer, gold in pairs]
        try:
            return self._workers.run(_verify, tasks, self.timeout_s) if tasks else []
        except WorkersError as error:
            raise RewardError(self.name, str(error)) from None

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        _check_batch("math_reward", completions, answers)
        rewards = [0.0] * len(completions)
        undecided: dict[tuple[str, str], list[int]] = {}
        for i, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            box = last_boxed(completion)
            if box is None or len(box) >= MAX_BOX_CHARACTERS:
                continue
            pair = clean(box), clean(answer)
            verdict = compare_strings(*pair)
            if verdict is None:
                undecided.setdefault(pair, []).append(i)
            else:
                rewards[i] = float(verdict)
        verdicts = self._verify(list(undecided))
        for ((_, gold), where), verdict in zip(undecided.items(), verdicts, strict=True):
            if isinstance(verdict, TimeoutError | ProcessExpired):
                self.timeouts += len(where)
            elif verdict is None:
                warnings.warn(f"math_reward: {_unparsable(gold)}", stacklevel=2)
            else:
                for i in where:
                    rewards[i] = float(verdict)
        return rewards

    def check_answers(self, answers: list[str]) -> list[str]:
        """See the function `check_answers`."""
        _check_batch("check_answers", answers, answers)
        first: dict[str, int] = {}
        for i, answer in enumerate(answers):
            first.setdefault(clean(answer), i)
        plain = re.compile(f"{WORD.pattern}|{INTEGER.pattern}|.{{{MAX_BOX_CHARACTERS},}}", re.S)
        pairs = [(gold, gold) for gold in first if gold and not plain.fullmatch(key(gold))]
        graded = dict(zip(pairs, self._verify(pairs), strict=True))
        problems: list[str] = []
        for gold, i in first.items():
            verdict = graded.get((gold, gold), True)
            if not key(gold):
                problems.append(f"answers[{i}]: gold answer {answers[i]!r} is empty")
            elif len(gold) >= MAX_BOX_CHARACTERS:
                problems.append(f"answers[{i}]: gold answer {gold[:40]!r}... is too long")
            elif verdict is None:
                problems.append(f"answers[{i}]: {_unparsable(gold)}")
            elif verdict is not True:
                problems.append(f"answers[{i}]: {gold!r} does not grade as itself: {verdict!r}")
        return problems

    def close(self) -> None:
        self._workers.close()


def _unparsable(gold: str) -> str:
    return f"gold answer {gold!r} cannot be parsed; only the same string will earn a reward"


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


class UserReward(RewardFunction):
    """Calls the user's function in a worker process, see `load_reward`."""

    def __init__(self, name: str, timeout_s: float) -> None:
        super().__init__()
        self.name = name
        self.timeout_s = timeout_s
        self._workers = Workers(1, partial(_start_user_worker, os.getcwd()))
        try:
            problem = self._run(_check_user, IMPORT_TIMEOUT_S, name)
        except RewardError as error:
            problem = str(error)
        if problem:
            self.close()
            raise ValueError(f'load_reward: wanted "module:function", got {name!r}: {problem}')

    def _run(self, function: Callable[..., Any], timeout_s: float, *args: Any) -> Any:
        try:
            (result,) = self._workers.run(function, [args], timeout_s)
        except WorkersError as error:
            raise RewardError(self.name, str(error)) from None
        if isinstance(result, TimeoutError):
            raise RewardError(self.name, f"took more than {timeout_s:g} s and was killed")
        if isinstance(result, ProcessExpired):
            raise RewardError(self.name, f"its worker process died, exit code {result.exitcode}")
        return result

    def __call__(self, completions: list[str], answers: list[str]) -> list[float]:
        _check_batch(self.name, completions, answers)
        # Instant, except in the replacement of a dead worker: imports have their own deadline.
        if problem := self._run(_check_user, IMPORT_TIMEOUT_S, self.name):
            raise RewardError(self.name, problem)
        batch = self.name, list(completions), list(answers)
        try:
            rewards, problem, index = self._run(_call_user, self.timeout_s, *batch)
        except RewardError:
            self.timeouts += 1
            raise
        if problem:
            raise RewardError(self.name, problem, index)
        return rewards

    def close(self) -> None:
        self._workers.close()


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
    _check_batch("boxed_string_reward", completions, answers)
    boxes = map(last_boxed, completions)
    return [
        float(box is not None and same_string(box, gold))
        for box, gold in zip(boxes, answers, strict=True)
    ]


def exact_reward(completions: list[str], answers: list[str]) -> list[float]:
    """1.0 where the completion equals the answer, apart from surrounding white space, else 0.0.

    Raises ValueError for lists of different lengths and for anything but strings in them.
    """
    _check_batch("exact_reward", completions, answers)
    return [float(c.strip() == a.strip()) for c, a in zip(completions, answers, strict=True)]


def load_reward(name: str, timeout_s: float = 5.0) -> RewardFunction:
    """The reward function of this name: `(completions, answers) -> one float each`.

    name: "math" (or "math_verify"), "boxed_string", "exact", or "module:function" of your own,
        importable from the current directory; it runs in its own worker process and must return
        one finite number per completion.
    timeout_s: seconds, > 0: for "math" per answer, which then earns 0.0; for your own function per
        batch (importing its module, up to 60 s, does not count).

    Raises ValueError if there is no such function. Calls of your own function raise `RewardError`
    if it raises, takes too long, or returns anything else.
    """
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"load_reward: timeout_s must be positive and finite, got {timeout_s}")
    if name in ("math", "math_verify"):
        return MathReward(timeout_s)
    if name == "boxed_string":
        return BoxedStringReward()
    if name == "exact":
        return ExactReward()
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(
            'load_reward: wanted "math", "boxed_string", "exact" or "module:function", '
            f"got {name!r}"
        )
    return UserReward(name, timeout_s)
