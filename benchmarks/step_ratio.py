"""What OISD adds to a step: the arithmetic recipe and its GRPO twin, step by step in turns.

    python -m benchmarks.step_ratio MODEL [--steps 60] [--out benchmarks/results]

MODEL is a checkpoint of the arithmetic task, `runs/arithmetic/checkpoints/step-0` say. Both
trainers take a step each in turns, so that both see the same machine, at a learning rate so small
that both keep sampling the same completions: rewards that differ make the result wrong, and no
ratio is printed. Steps that also measure each loss's own gradient norm are switched off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.trl_throughput import ROOT, machine
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
    pairs = zip(oisd, grpo, strict=True)
    ratios = sorted(a["time/step"] / b["time/step"] for a, b in pairs)
    cuts = statistics.quantiles(ratios, n=5)
    result = {
        "oisd_s": statistics.median(row["time/step"] for row in oisd),
        "grpo_s": statistics.median(row["time/step"] for row in grpo),
        "ratio": statistics.median(ratios),
        "ratio_p20": cuts[0],
        "ratio_p80": cuts[3],
        "steps": len(ratios),
    }
    print(
        f"OISD {result['oisd_s']:.3f} s, GRPO {result['grpo_s']:.3f} s a step; ratio of pairs: "
        f"median {result['ratio']:.3f} (p20 {cuts[0]:.3f}, p80 {cuts[3]:.3f}), {len(ratios)} steps"
    )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "step_ratio.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**result, **machine()}) + "\n")


def make(recipe: str, model: str, folder: str) -> Trainer:
    """The recipe's trainer, beginning with `model` and hardly learning."""
    tables = to_tables(load_recipe(ROOT / "recipes" / f"{recipe}.toml"))
    tables["model"]["path"] = model
    tables["warmup"] = {"steps": 0}
    tables["eval"] = {}
    tables["optimizer"] |= {"learning_rate": 1e-9, "schedule": "constant"}
    tables["run"] |= {"output_dir": folder, "grad_norm_every": 0, "completions_every": 0}
    return Trainer(from_tables(tables))


if __name__ == "__main__":
    main()
