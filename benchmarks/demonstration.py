"""GRPO, each alignment alone, and both: several seeds of each on the built-in arithmetic task.

    python -m benchmarks.demonstration [--seeds 0 1 2] [--out runs/demonstration]
                                       [--results benchmarks/results] [-- --run.steps 20 ...]

Every arm trains the same recipe, recipes/arithmetic.toml; only the two weights differ. For a seed,
all arms start from the same warmed-up model, see the same problems in the same order, and are
evaluated on the same held-out ones, so that arms are compared by their differences seed by seed.
Arguments after `--` go to every run.

Each run has its own folder. Run the same command again to resume: finished runs are not repeated,
and an interrupted one continues.

The interval of a mean is Student's t over the seeds, 95 %. It is wide for three seeds, as it should
be: two-digit sums, of which a tiny model solves 97 %, show whether the mechanics work. They cannot
show whether the method helps a language model, and the printed note says so.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure.machine import append, describe
from oisd.cli import parse_train
from oisd.config import differences, load_recipe
from oisd.jsonl import read_rows
from oisd.plots import BLUE, GREEN, INK, ORANGE, save_figure, style_axes

ARMS = {
    "GRPO": (0.0, 0.0),
    "think only": (1.0, 0.0),
    "attention only": (0.0, 0.1),
    "both (OISD)": (1.0, 0.1),
}
COLOURS = (INK, BLUE, ORANGE, GREEN)
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NOTE = (
    "Intervals: Student's t over the seeds, 95 %. Differences are within seeds. An interval that "
    "holds 0 shows no difference; a task this small cannot show that the method helps. Seconds are "
    "medians of runs one after another, which include whatever else the machine did. For the cost "
    "of a step, see `python -m benchmarks.step_ratio`, which takes turns."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, then write the table, the picture and the results."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demonstration"))
    parser.add_argument("--results", type=Path, default=None, help="folder for demonstration.jsonl")
    options = parser.parse_args(arguments[:split])
    overrides = arguments[split + 1 :]
    # By seeds, so that an interrupted study has complete seeds.
    for seed in options.seeds:
        for arm in ARMS:
            train(arm, seed, options.out, overrides)
    found = {arm: [outcome(run_folder(options.out, arm, s)) for s in options.seeds] for arm in ARMS}
    table = markdown(found)
    print(table)
    (options.out / "demonstration.md").write_text(table, encoding="utf-8")
    draw(options.out, options.seeds, options.out / "demonstration.png")
    if options.results:
        path = options.results / "demonstration.jsonl"
        path.unlink(missing_ok=True)
        rows = [{"arm": arm, "seed": seed, **row} for arm, outcomes in found.items()
                for seed, row in zip(options.seeds, outcomes, strict=True)]  # fmt: skip
        append(path, rows, describe("cpu", 1))


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The folder of a run."""
    return out / f"{arm.split(' (')[0].replace(' ', '-').lower()}-seed-{seed}"


def train(arm: str, seed: int, out: Path, overrides: Sequence[str]) -> None:
    """Run one arm with one seed, unless it has finished, in a process of its own."""
    think, attention = ARMS[arm]
    folder = run_folder(out, arm, seed)
    settings = {
        "--oisd.think-weight": think,
        "--oisd.attention-weight": attention,
        "--run.seed": seed,
        "--run.output-dir": folder,
        # The gradient norm of each loss costs extra passes, which are not part of a step's cost.
        "--run.grad-norm-every": 0,
    }
    command = [word for key, value in settings.items() for word in (key, str(value))]
    wanted = parse_train(["arithmetic", *command, *overrides])
    if (folder / "summary.json").exists():
        changed = differences(load_recipe(folder / "config.toml"), wanted)
        if changed:
            raise SystemExit(f"{folder} holds a run with other settings: {'; '.join(changed)}")
        return
    print(f"{arm}, seed {seed}: {folder}", flush=True)
    full = [sys.executable, "-m", "oisd.cli", "train", "arithmetic", *command, *overrides]
    subprocess.run(full, check=True)


def outcome(folder: Path) -> dict[str, Any]:
    """The numbers of a finished run."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    evaluated = [row["eval/avg_at_k"] for row in rows if "eval/avg_at_k" in row]
    steps = [row["time/step"] for row in rows if "time/step" in row]
    return {
        "before": evaluated[0],
        "after": evaluated[-1],
        "step_s": statistics.median(steps[min(5, len(steps) - 1) :]),
        "steps": len(steps),
    }


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean; NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    t = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else 1.96
    return t * statistics.stdev(values) / math.sqrt(n)


def markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table, one row for each arm, and a note on how to read it."""
    (count,) = {len(outcomes) for outcomes in found.values()}
    lines = [
        f"| {count} seeds | before | after | after, less GRPO's | s a step | x GRPO |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = found["GRPO"]
    for arm, outcomes in found.items():
        pairs = list(zip(outcomes, base, strict=True))
        gains = [a["after"] - b["after"] for a, b in pairs]
        ratio = statistics.median(a["step_s"] / b["step_s"] for a, b in pairs)
        cells = [
            arm,
            _mean([o["before"] for o in outcomes]),
            _mean([o["after"] for o in outcomes]),
            "" if arm == "GRPO" else _mean(gains, sign="+"),
            f"{statistics.median(o['step_s'] for o in outcomes):.3f}",
            f"{ratio:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{NOTE}\n"


def _mean(values: Sequence[float], sign: str = "") -> str:
    half = interval(values)
    spread = "" if math.isnan(half) else f" ± {half:.3f}"
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def draw(out: Path, seeds: Sequence[int], path: Path) -> None:
    """Training reward and held-out accuracy of each arm: the seeds' mean, and their range."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (("reward", "Training reward"), ("eval/avg_at_k", "Held-out accuracy"))
    for place, (metric, title) in enumerate(panels, start=1):
        ax = figure.add_subplot(1, 2, place)
        for arm, colour in zip(ARMS, COLOURS, strict=True):
            curves = [series(run_folder(out, arm, seed), metric) for seed in seeds]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            means = [statistics.mean(v) for v in values]
            ax.plot(steps, means, color=colour, linewidth=1.6, label=arm)
            low, high = [min(v) for v in values], [max(v) for v in values]
            ax.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        style_axes(ax, title, "step", "")
    figure.axes[0].legend(fontsize=9, frameon=False, loc="lower right")
    caption = f"Mean of {len(seeds)} seeds, shaded: their range"
    figure.suptitle(caption, fontsize=9, x=0.99, ha="right")
    save_figure(figure, path)


def series(folder: Path, metric: str) -> dict[int, float]:
    """A metric by step; the reward as a mean of ten steps, so that arms can be told apart."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    found = {row["step"]: row[metric] for row in rows if metric in row}
    if metric != "reward":
        return found
    steps = sorted(found)
    window = {s: [found[t] for t in steps[max(0, i - 9) : i + 1]] for i, s in enumerate(steps)}
    return {step: statistics.mean(values) for step, values in window.items()}


if __name__ == "__main__":
    main()
