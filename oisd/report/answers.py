"""Completions of a run: those that training made right or wrong, and some that it learned from.

An evaluation draws the n-th completion of a problem from the same random numbers at every step, so
that it can be held against the n-th completion before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from oisd.config import ConfigError
from oisd.evaluate import Problem
from oisd.jsonl import DamagedFileError, read_rows
from oisd.report.runs import Run

SHOWN = 3
_LONGEST = 900


@dataclass(frozen=True)
class Change:
    """A completion of one problem before and after."""

    prompt: str
    answer: str
    before: str
    after: str
    share_before: float
    """Share of the problem's completions that are right."""
    share_after: float


@dataclass(frozen=True)
class Changes:
    """How the first and the last evaluation of a run differ."""

    first: int
    last: int
    problems: int
    counts: dict[str, int]
    """Completions by what became of them."""
    to_right: list[Change]
    to_wrong: list[Change]


def changes(run: Run) -> Changes | None:
    """Compare the first evaluation with the last; None unless there are two of the same problems.

    A completion is right from a reward of 1. Examples are of the first problems that have one, in
    the order of the evaluation, one of each problem.
    """
    steps = run.evaluated_steps
    if len(steps) < 2:
        return None
    after = {p.id: p for p in run.problems(steps[-1])}
    pairs = [(p, after[p.id]) for p in run.problems(steps[0]) if p.id in after]
    if not pairs:
        return None
    counts = {"right, as before": 0, "wrong, as before": 0, "wrong to right": 0,
              "right to wrong": 0}  # fmt: skip
    for old, new in pairs:
        for a, b in zip(old.rewards, new.rewards, strict=False):
            counts[_became(a >= 1, b >= 1)] += 1
    to_right, to_wrong = (list(_examples(pairs, wanted))[:SHOWN] for wanted in (True, False))
    return Changes(steps[0], steps[-1], len(pairs), counts, to_right, to_wrong)


def _became(before: bool, after: bool) -> str:
    if before == after:
        return "right, as before" if after else "wrong, as before"
    return "wrong to right" if after else "right to wrong"


def _examples(pairs: Sequence[tuple[Problem, Problem]], to_right: bool) -> Iterator[Change]:
    for old, new in pairs:
        rewards = zip(old.rewards, new.rewards, strict=False)
        places = [i for i, (a, b) in enumerate(rewards) if (a >= 1) != (b >= 1) == to_right]
        if places:
            place = places[0]
            yield Change(
                shortened(old.prompt),
                shortened(old.answer),
                shortened(old.completions[place]),
                shortened(new.completions[place]),
                _share(old),
                _share(new),
            )


def _share(problem: Problem) -> float:
    return sum(reward >= 1 for reward in problem.rewards) / len(problem.rewards)


def shortened(text: str) -> str:
    """A long text without its middle, where it says how much is missing."""
    if len(text) <= _LONGEST:
        return text
    part = _LONGEST // 2
    return f"{text[:part]}\n[... {len(text) - 2 * part:,} characters left out ...]\n{text[-part:]}"


def training_samples(run: Run) -> list[tuple[int, list[dict[str, Any]]]]:
    """The first rows of the first and of the last table of completions, with its step."""
    steps = run.completion_steps
    found = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        file = run.folder.completions / f"step-{step}.jsonl"
        try:
            rows = [
                {
                    "prompt": shortened(str(row["prompt"])),
                    "completion": shortened(str(row["completion"])),
                    "answer": shortened(str(row["answer"])),
                    "reward": float(row["reward"]),
                    "advantage": float(row["advantage"]),
                }
                for row in read_rows(file)[0][:SHOWN]
            ]
        except DamagedFileError as error:
            raise ConfigError(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{file} is not a table of completions: {error!r}") from error
        found.append((step, rows))
    return found
