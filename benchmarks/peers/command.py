"""The command line of `python -m benchmarks peers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmarks.measure.machine import append, describe, package
from benchmarks.peers import cost, graders, lenses, page, step
from benchmarks.peers.lenses import Row

FILE = Path(__file__).parents[1] / "results" / "peers.jsonl"
# math-verify reads fewer answers with the antlr4 4.9.3 that omegaconf, and so verl, asks for.
PACKAGES = (
    "transformer-lens", "nnsight", "math-verify", "sympy", "antlr4-python3-runtime", "trl", "verl",
    "lm-eval",
)  # fmt: skip
Part = Literal["lens", "cost", "graders", "step"]
PARTS: tuple[Part, ...] = ("lens", "cost", "graders", "step")


@dataclass(frozen=True)
class Peers:
    """Other projects' lenses, graders and training step beside ours; what is not installed is
    named as absent.

    lens: our log-probabilities of every layer against theirs, on ten tiny models.
    cost: time and memory at GPT-2 small's shape, each lens in a process of its own, in turns.
    graders: verdicts on the answers of tests/data/grading.jsonl.
    step: time of a step of GRPO and of OISD beside TRL's GRPOTrainer, in turns.
    """

    parts: Annotated[tuple[Part, ...], tyro.conf.Positional] = PARTS
    rounds: int = 5
    """Of the parts "cost" and "step"."""
    out: Path = FILE
    """File to which rows are appended."""
    write_docs: bool = False
    """Only write docs/peers.md, from the latest rows of the file."""


def main(arguments: list[str]) -> int:
    """Measure, print and append rows; 1 if a lens that can run disagrees or is wrong.

    Raises ValueError for fewer than one round.
    """
    given = tyro.cli(
        Peers,
        prog="python -m benchmarks peers",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if given.rounds < 1:
        raise ValueError(f"peers: --rounds must be at least 1, got {given.rounds}")
    if given.write_docs:
        page.write(page.read(given.out))
        return 0
    torch.set_num_threads(1)
    machine = describe("cpu", 1)
    machine["versions"] |= {name: found for name in PACKAGES if (found := package(name))}
    bad = 0
    for part in given.parts:
        for row in rows_of(part, given.rounds):
            print(page.line(row), flush=True)
            append(given.out, [row], machine)
            bad += not row.get("agrees", True) or "wrong" in row or "failed" in row
    return int(bad > 0)


def rows_of(part: Part, rounds: int) -> Iterator[Row]:
    if part == "lens":
        return lenses.agreement()
    if part == "cost":
        return cost.measure(rounds, say=lambda text: print(text, flush=True))
    if part == "step":
        return step.measure(rounds)
    return graders.verdicts()
