r"""Verdicts and time of the `math` reward beside plain math-verify, in one run.

    python -m benchmarks.grading [--problems 128] [--group 8] [--steps 60] [--rounds 3]

The batch is one step's: `--problems` golds with `--group` completions each, the answers of
tests/data/grading.jsonl inside long completions. Left out are the answers that are meant to hang a
parser or are too long to be read. Plain math-verify parses gold and completion and compares them,
one after the other in one process, as its README shows. Ours is timed cold, as the first call of
a new process (imports apart), and warm, with its workers running but nothing remembered of the
batch. The graders take turns.

Before anything is timed, verdicts graded in a batch must be those graded one by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from oisd.rewards import MathReward
from oisd.rewards.grading import forget

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "data" / "grading.jsonl"
STEP = (
    "Step {i}. With $u_{i}=\\frac{{x+{i}}}{{\\sqrt{{y_{{{i}}}}}}}$ we get "
    "\\[ \\int_0^{{{i}}} u\\,du = \\frac{{{i}^2}}{{2}}, \\] so $a_{{{i}}} = {i}$ and the sum "
    "grows by {i}.\n"
)


def completion(box: str, steps: int) -> str:
    """Some steps of reasoning, 140 characters each, and the box."""
    thoughts = "".join(STEP.format(i=i) for i in range(steps))
    return f"{thoughts}Hence the answer is $\\boxed{{{box}}}$."


def table() -> list[tuple[str, str, bool]]:
    """Box, gold and the human's verdict."""
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return [
        (row["box"], row["gold"], row["right"])
        for row in rows
        if "box" in row and row["kind"] not in ("bomb", "long") and row["box"].isprintable()
    ]


def batch(problems: int, group: int, steps: int) -> tuple[list[str], list[str]]:
    """Completions and golds: the answers to each gold, repeated to fill its group."""
    answers: dict[str, list[str]] = {}
    for box, gold, _ in table():
        answers.setdefault(gold, []).append(box)
    golds = sorted(answers, key=lambda gold: -len(answers[gold]))
    completions, wanted = [], []
    for i in range(problems):
        gold = golds[i % len(golds)]
        boxes = answers[gold]
        completions += [completion(boxes[j % len(boxes)], steps) for j in range(group)]
        wanted += [gold] * group
    return completions, wanted


def plain_math_verify(completions: list[str], golds: list[str]) -> list[float]:
    """As in math-verify's README."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return [
        float(verify(parse(f"${gold}$"), parse(completion)))
        for completion, gold in zip(completions, golds, strict=True)
    ]


def timed(grade: Callable[[], list[float]]) -> float:
    start = time.perf_counter()
    grade()
    return time.perf_counter() - start


def cold(*size: int) -> float:
    """Seconds of the first call in a new process."""
    code = (
        "import warnings, benchmarks.grading as b; warnings.simplefilter('ignore')\n"
        f"c, g = b.batch(*{size}); r = b.MathReward()\n"
        "print(b.timed(lambda: r(c, g))); r.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def mistakes(grade: Callable[[list[str], list[str]], list[float]]) -> tuple[int, int]:
    """Wrong answers accepted and right ones refused, of the whole table."""
    rows = table()
    rewards = grade([f"\\boxed{{{box}}}" for box, _, _ in rows], [gold for _, gold, _ in rows])
    verdicts = list(zip(rows, rewards, strict=True))
    return (
        sum(reward > 0 and not right for (_, _, right), reward in verdicts),
        sum(not reward and right for (_, _, right), reward in verdicts),
    )


def main() -> None:
    """Measure, print, append a row to a JSONL file."""
    parser = argparse.ArgumentParser(description="Verdicts and time of the math reward")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of reasoning before the box")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for grading.jsonl")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    size = arguments.problems, arguments.group, arguments.steps
    completions, golds = batch(*size)
    reward = MathReward()
    together = reward(completions, golds)
    alone = []
    for text, gold in zip(completions, golds, strict=True):
        forget()
        alone += reward([text], [gold])
    if together != alone:
        raise SystemExit("WRONG: a batch earns other rewards than its completions one by one")
    times: dict[str, list[float]] = {"math-verify": [], "cold": [], "warm": []}
    plain_math_verify(completions[:1], golds[:1])
    for _ in range(arguments.rounds):
        times["math-verify"].append(timed(partial(plain_math_verify, completions, golds)))
        times["cold"].append(cold(*size))
        forget()
        times["warm"].append(timed(partial(reward, completions, golds)))
    ours, theirs = mistakes(reward), mistakes(plain_math_verify)
    reward.close()
    result: dict[str, object] = {
        "completions": len(completions),
        "characters": sum(map(len, completions)) // len(completions),
        "distinct": len(set(zip(completions, golds, strict=True))),
        **{f"{name}_s": round(statistics.median(found), 4) for name, found in times.items()},
        **{
            f"{name}_ratio": round(
                statistics.median(
                    a / b for a, b in zip(times[name], times["math-verify"], strict=True)
                ),
                4,
            )
            for name in ("cold", "warm")
        },
        "cases": len(table()),
        "wrong_accepted": ours[0],
        "right_refused": ours[1],
        "math_verify_wrong_accepted": theirs[0],
        "math_verify_right_refused": theirs[1],
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "grading.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
