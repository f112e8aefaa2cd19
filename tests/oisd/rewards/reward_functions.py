"""Reward functions as users write them, good and bad; tests name them as `module:function`."""

import os
import sys
import time

NOT_A_FUNCTION = 3


def length(completions, answers):
    """Reward the right number of characters."""
    return [float(len(c) == int(a)) for c, a in zip(completions, answers, strict=True)]


def main_module(completions, answers):
    """Whether torch, or the caller's main module, is in this process."""
    main = sys.modules["__main__"]
    return [float("torch" in sys.modules), float(hasattr(main, "__file__"))]


def importing(completions, answers):
    """Imports when it is called, and says what had been imported by then."""
    before = "tests.oisd.rewards.slow_to_import" in sys.modules
    from tests.oisd.rewards.slow_to_import import FAST

    return [float(before) + FAST] * len(completions)


def raising(completions, answers):
    raise KeyError("no such thing as " + completions[0])


def leaving(completions, answers):
    sys.exit(3)


def dying(completions, answers):
    os._exit(7)


def hanging(completions, answers):
    if "hang" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


def one_short(completions, answers):
    return [1.0] * (len(completions) - 1)


def values(completions, answers):
    """The first completion, evaluated."""
    return eval(completions[0])
