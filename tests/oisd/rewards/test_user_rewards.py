"""Reward functions of the user: loaded by name, run in workers, and refused in words."""

import math
import re
import time

import pytest

from oisd.rewards import RewardError, load_reward
from tests.oisd.rewards.test_rewards import MODULE


@pytest.fixture
def user():
    """Loads `reward_functions:<name>` and closes it afterwards."""
    opened = []

    def load(name, timeout_s=10.0):
        opened.append(load_reward(f"{MODULE}:{name}", timeout_s))
        return opened[-1]

    yield load
    for reward in opened:
        reward.close()


def test_user_function(user):
    reward = user("length")
    assert reward(["abc", "abcd", ""], ["3", "3", "0"]) == [1.0, 0.0, 1.0]
    assert reward([], []) == []
    assert (reward.name, reward.timeouts) == (f"{MODULE}:length", 0)
    with pytest.raises(ValueError, match="got 1 completions and 0 answers"):
        reward(["a"], [])
    reward.close()
    reward.close()
    assert reward(["abc"], ["3"]) == [1.0]


def test_user_function_that_raises(user):
    reward = user("raising")
    with pytest.raises(RewardError, match="reward_functions:raising: raised KeyError") as caught:
        reward(["this"], ["1"])
    assert "no such thing as this" in str(caught.value)
    assert "in raising" in str(caught.value)  # the traceback
    assert (caught.value.function, caught.value.index) == (
        f"{MODULE}:raising",
        None,
    )


def test_user_function_that_leaves_or_dies(user):
    with pytest.raises(RewardError, match="raised SystemExit"):
        user("leaving")(["a"], ["1"])
    with pytest.raises(RewardError, match="its worker process died, exit code 7"):
        user("dying")(["a"], ["1"])


def test_user_function_that_hangs(user):
    reward = user("hanging", 0.5)
    assert reward(["go", "go"], ["", ""]) == [1.0, 1.0]
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"hanging: took more than 0.5 s and was killed"):
        reward(["hang"], [""])
    assert time.perf_counter() - start < 5.0
    assert reward.timeouts == 1
    assert reward(["go"], [""]) == [1.0]


def test_what_a_function_imports_itself_is_not_grading(user):
    assert user("importing", 0.5)(["a"], [""]) == [1.5]


def test_user_function_of_the_wrong_length(user):
    with pytest.raises(RewardError, match="returned 2 values for 3 completions") as caught:
        user("one_short")(["a", "b", "c"], [""] * 3)
    assert caught.value.index == 2


def test_user_function_with_wrong_values(user):
    reward = user("values")
    for value in ("float('nan')", "-float('inf')", "None", "'1'", "1j", "[1]", "10**400"):
        with pytest.raises(RewardError, match="at index 1, wanted a finite number") as caught:
            reward([f"[0.5, {value}]", ""], ["", ""])
        assert caught.value.index == 1
    for value in ("None", "1.0", "'11'", "{0: 1.0, 1: 1.0}", "(1 for _ in 'ab')"):
        with pytest.raises(RewardError, match="wanted a list of numbers"):
            reward([value, ""], ["", ""])
    assert reward(["(True, 2)", ""], ["", ""]) == [1.0, 2.0]
    array = "__import__('array').array('f', [0.5, -1])"
    assert reward([array, ""], ["", ""]) == [0.5, -1.0]


BAD_NAMES = {
    "no_colon": (
        f"{MODULE}.length",
        '"countdown", "reasoning-gym" or "module:function"',
    ),
    "empty": ("", "module:function"),
    "no_module": (":length", "module:function"),
    "no_function": (f"{MODULE}:", "module:function"),
    "unknown_module": (
        "no_such_module:length",
        "cannot import module 'no_such_module': there is none of that name in ",
    ),
    "unknown_submodule": (
        "tests.oisd.no_such:length",
        "cannot import module 'tests.oisd.no_such': there is none of that name in ",
    ),
    "raising_module": (
        "tests.oisd.rewards.broken_rewards:f",
        "cannot import module 'tests.oisd.rewards.broken_rewards': KeyError: 'most' (",
    ),
    "unknown_function": (
        f"{MODULE}:no_such",
        "has no attribute 'no_such'",
    ),
    "not_callable": (f"{MODULE}:NOT_A_FUNCTION", "it is a int"),
}


@pytest.mark.parametrize("name, problem", BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_names(name, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        load_reward(name)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert "broken" not in name or "broken_rewards.py, line 7)" in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.inf, math.nan])
def test_bad_timeouts(timeout_s):
    with pytest.raises(ValueError, match="timeout_s must be positive and finite"):
        load_reward("math", timeout_s)
