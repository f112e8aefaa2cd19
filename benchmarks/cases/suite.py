"""Every case there is, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cases import aligned, attention, head, lens, step
from benchmarks.cases.case import Case


def all_cases(device: str) -> list[Case]:
    """Every case for "cpu" or "cuda", most telling first."""
    built: list[Case] = []
    for module in (lens, head, attention, aligned, step):
        built += module.cases(device)
    names = [case.name for case in built]
    assert len(set(names)) == len(names), "two cases share a name"
    return built


def select(cases: Iterable[Case], patterns: Sequence[str], suite: str) -> list[Case]:
    """Cases of a suite, or those whose name holds one of the patterns, in any suite.

    Raises ValueError for a pattern that no case has.
    """
    cases = list(cases)
    if not patterns:
        return [case for case in cases if suite in case.suites]
    for pattern in patterns:
        if not any(pattern in case.name for case in cases):
            raise ValueError(
                f"benchmarks: no case has {pattern!r} in its name; `python -m benchmarks list` "
                "shows all"
            )
    return [case for case in cases if any(pattern in case.name for pattern in patterns)]
