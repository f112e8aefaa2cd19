"""Answers that only computer algebra can evaluate, inside a worker process.

math-verify reads the limit, integral or gigantic power, sympy evaluates it, and what comes out is
compared as every other answer. math-verify's own comparison, which takes numbers for equal that
agree in six decimals, decides nothing here.
"""

import logging
import re
import signal
import sys
from functools import lru_cache
from typing import Any

from oisd.rewards.reading.spelling import tidy
from oisd.rewards.verdicts import is_readable, verdict

_SIDE_BY_SIDE = re.compile(r"\d\s+[\d.]")
WORKER_BYTES = 4 << 30  # address space of a worker, which idles at 0.1 GiB


def start_worker() -> None:
    """Prepare this process: the imports, a signal that ends it, a bound on its memory."""
    import math_verify  # noqa: F401  # imported before the first task, whose time is limited
    import mpmath  # noqa: F401

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler waits for sympy's C code
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    # sympy imports most of itself at the first integral, which is not to count as its time.
    for expression in (r"\int_0^1 x\,dx", r"\lim_{x\to 0}\frac{\sin x}{x}"):
        closed_form(expression)


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> Any:
    from math_verify import LatexExtractionConfig, parse

    if "\\" not in tidy(answer) and _SIDE_BY_SIDE.search(tidy(answer)):
        return None  # math-verify would take 1 2 for the mixed number 1 + 2
    # Only the box: without one, math-verify would take any fraction it finds in the text.
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    boxed = "\\boxed{" + tidy(answer) + "}"
    found = parse(boxed, [config], "no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    return found[0] if found else None


@lru_cache(maxsize=4096)
def closed_form(answer: str) -> str | None:
    """What sympy makes of an answer, in LaTeX; None where math-verify cannot read it."""
    from sympy import latex

    tree = _parsed(answer)
    return None if tree is None else latex(tree.doit(), ln_notation=True)


def verify(answer: str, gold: str, timeout_s: float) -> bool | None:
    """Verdict on one pair; None: the gold answer cannot be read."""
    if hasattr(signal, "setitimer"):  # ends the worker if its parent has died
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
    try:
        return _verify(answer, gold)
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _verify(answer: str, gold: str) -> bool | None:
    wanted = gold if is_readable(gold) else closed_form(gold)
    if wanted is None:
        return None
    if answer == gold:
        return True
    found = answer
    if verdict(answer, wanted) is None:
        try:
            found = closed_form(answer)
        except Exception:  # whatever sympy makes of nonsense
            return False
    return found is not None and verdict(found, wanted) is True
