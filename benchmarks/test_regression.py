"""CPU cases under pytest-benchmark, held to a committed baseline.

    pytest benchmarks --benchmark-only          run and compare
    python -m benchmarks.test_regression        write a new baseline, on a quiet machine

Seconds depend on the machine; their ratio to a fixed yardstick in the same run hardly does. The
yardstick is a bare matmul and an exponential of its result, which all these operations consist of.
Yardstick and operation take turns, and the median of the pairs' ratios counts. A ratio above 1.5
times the baseline is measured twice more before it is called a regression.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.cases import attention, head
from benchmarks.cases.case import Absent, Case, Run
from benchmarks.cases.lens import Shape
from benchmarks.cases.lens import case as lens_case
from benchmarks.cases.shapes import Attention, Head
from benchmarks.measure.timer import Plan, interleaved

BASELINE = Path(__file__).parent / "baseline.json"
SLACK = 1.5
PLAN = Plan(rounds=9, least=9)
HEAD = Head(256, 8192)


def cases() -> dict[str, tuple[Case, str]]:
    """Small enough for a second each: case and implementation."""
    lens = {
        f"lens, S = {s}": (lens_case(Shape(HEAD, "test", s, 256), "cpu", torch.float32),
                           "ours: chunked")
        for s in (1, 4)
    }  # fmt: skip
    logprob = head.logprob("test", HEAD, 256, "cpu", frozenset())
    policy = head.policy("test", HEAD, 1, 256, "cpu", frozenset())
    plain = attention.divergence("test", Attention(4, 2, 32), 256, "cpu", frozenset(), bars=False)
    return lens | {
        "linear_logprob": (logprob, "ours: chunked"),
        "policy_head": (policy, "ours: policy_head"),
        "attention_divergence": (plain, "ours: torch"),
    }


CASES = cases()


def bound(name: str) -> Run:
    case, chosen = CASES[name]
    torch.set_num_threads(1)
    known = {i.name: i for i in case.implementations}
    for implementation in (chosen, "ours: reference"):
        run = known[implementation].make(case.inputs())
        try:
            run()
        except Absent:
            continue
        return run
    raise AssertionError(f"{name}: nothing runs here")


def yardstick() -> Callable[[], object]:
    """A matmul of 256 rows with the unembedding, and the exponential of it."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, HEAD.width, generator=generator) for n in (256, HEAD.vocabulary))
    return lambda: torch.mm(rows, weight.t()).exp_()


def ratio(run: Callable[[], object]) -> float:
    """Median over pairs of seconds of `run` over seconds of the yardstick."""
    seconds = interleaved({"bare": yardstick(), "run": run}, PLAN, "cpu")
    pairs = zip(seconds["run"], seconds["bare"], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


@pytest.mark.parametrize("name", list(CASES))
def test_not_slower_than_the_baseline(name: str, benchmark) -> None:
    run = bound(name)
    baseline = json.loads(BASELINE.read_text())[name]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    found = []
    for _ in range(3):
        found.append(ratio(run))
        if found[-1] <= SLACK * baseline:
            break
    benchmark.extra_info |= {"ratio": min(found), "baseline": baseline}
    assert min(found) <= SLACK * baseline, (
        f"{name} takes {min(found):.2f} times the yardstick, {baseline:.2f} in the baseline"
    )


def main() -> None:
    """Write the baseline: the median of five measurements of each case."""
    found = {name: round(statistics.median(ratio(bound(name)) for _ in range(5)), 3)
             for name in CASES}  # fmt: skip
    BASELINE.write_text(json.dumps(found, indent=1) + "\n")
    print(BASELINE.read_text())


if __name__ == "__main__":
    main()
