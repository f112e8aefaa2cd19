"""A reward function of the user's own, `module:function`, in a worker process with a deadline."""

import dis
import importlib
import math
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from functools import partial
from types import CodeType
from typing import Any

from pebble import ProcessExpired

from oisd.rewards.function import RewardError, RewardFunction, check_batch
from oisd.rewards.workers import Workers, WorkersError
from oisd.schema import one_line

IMPORT_TIMEOUT_S = 60.0  # for the user's module, which may well import torch


# ---- inside the worker -----------------------------------------------------------------------


def _start_user_worker(directory: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(directory)
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _why(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _in_a_line(error: BaseException, module_name: str) -> str:
    """Why a module cannot be imported, and the line of the user's that raised."""
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{name}."):
        return f"there is none of that name in {os.getcwd()} or among the installed packages"
    text = one_line(error, named=True)
    frames = traceback.extract_tb(error.__traceback__)
    places = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    return f"{text} ({places[-1].filename}, line {places[-1].lineno})" if places else text


def _imports(code: CodeType | None) -> Iterator[str]:
    """The modules that a function's own code imports when it runs."""
    if code is None:
        return
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imports(constant)


def _find_user(name: str) -> tuple[Any, str | None]:
    """The user's function, and what is wrong with it; SystemExit must not end a worker."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:
        return None, f"cannot import module {module_name!r}: {_in_a_line(error, module_name)}"
    function = getattr(module, attribute, None)
    if function is None:
        return None, f"module {module_name!r} ({module.__file__}) has no attribute {attribute!r}"
    for name in _imports(getattr(function, "__code__", None)):
        # What the first call would import counts as importing, not as grading.
        with suppress(BaseException):
            importlib.import_module(name)
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


# ---- in the process that asks ----------------------------------------------------------------


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
        check_batch(self.name, completions, answers)
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
