"""What OISD adds to a step: the arithmetic recipe and the same with GRPO alone, in turns.

    python -m benchmarks.step_ratio MODEL [--steps 60] [--out benchmarks/results]

MODEL is a checkpoint of the arithmetic task, for example `runs/arithmetic/checkpoints/step-0`. The
trainers take steps in turns, so that both see the same machine. The learning rate is so small that
both keep sampling the same completions: if their rewards differ, the result is wrong and no ratio
is printed. The gradient norms of the single losses, which cost extra passes, are not measured.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.measure.machine import ROOT, append, describe
from benchmarks.measure.timer import paired
from oisd.config import from_tables, load_recipe, to_tables
from oisd.trainer import Trainer

UNTIMED = 5


def main() -> None:
    """Measure, print one line, append it to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=None, help="folder for step_ratio.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            recipe: make(recipe, arguments.model, f"{folder}/{recipe}")
            for recipe in ("arithmetic", "arithmetic-grpo")
        }
        rows = {recipe: [] for recipe in trainers}
        for _ in range(arguments.steps + UNTIMED):
            for recipe, trainer in trainers.items():
                with trainer._progress() as progress:
                    rows[recipe].append(trainer._train_step(progress))
                trainer.step += 1
    oisd, grpo = (found[UNTIMED:] for found in rows.values())
    if [a["reward"] for a in oisd] != [b["reward"] for b in grpo]:
        raise SystemExit("WRONG: the trainers did not sample the same completions")
    if not all(row["loss/think"] and row["loss/attention"] for row in oisd if row["grad_norm"]):
        raise SystemExit("WRONG: OISD's losses are 0")
    result = paired([row["time/step"] for row in oisd], [row["time/step"] for row in grpo])
    print("OISD {oisd_s:.3f} s, GRPO {grpo_s:.3f} s a step; ratio of pairs: median {ratio:.3f} "
          "(p20 {ratio_p20:.3f}, p80 {ratio_p80:.3f}), {steps} steps".format(**result))  # fmt: skip
    if arguments.out:
        append(arguments.out / "step_ratio.jsonl", [result], describe("cpu", 1))


def make(recipe: str, model: str, folder: str) -> Trainer:
    """The recipe's trainer, which begins with `model` and hardly learns."""
    tables = to_tables(load_recipe(ROOT / "recipes" / f"{recipe}.toml"))
    tables["model"]["path"] = model
    tables["warmup"] = {"steps": 0}
    tables["eval"] = {}
    tables["optimizer"] |= {"learning_rate": 1e-9, "schedule": "constant"}
    tables["run"] |= {"output_dir": folder, "grad_norm_every": 0, "completions_every": 0}
    return Trainer(from_tables(tables))


if __name__ == "__main__":
    main()
