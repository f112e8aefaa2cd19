"""Folders of runs, written as `oisd train` does, without training."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import tomli_w

from oisd.config import TrainConfig, from_tables, to_tables
from oisd.evaluate import Problem

HOSTILE = "<script>alert('x')</script></pre><b onmouseover=\"y\">&amp;"


def config(folder: Path, **changes: dict) -> TrainConfig:
    tables = {
        "data": {"source": "arithmetic:digits=2"},
        "reward": {"function": "exact"},
        "oisd": {"student_layers": [3]},
        "eval": {"source": "arithmetic:digits=2", "samples": 2},
        "run": {"steps": 40},
    }
    for name, table in changes.items():
        tables[name] = tables.get(name, {}) | table
    tables["run"]["output_dir"] = str(folder)
    return from_tables(tables)


def rows(steps: int = 40, seed: int = 0, **more: float) -> list[dict]:
    """Metrics that are all different, evaluated every tenth step."""
    found = []
    for step in range(steps + 1):
        row: dict = {"step": step}
        if step:
            row |= {
                "reward": 0.5 + 0.01 * step + 0.001 * seed + 0.002 * math.sin(step),
                "js/think_pos": 0.6 + 0.001 * step + 0.01 * seed,
                "js/think_neg": 0.65 if step % 2 else None,
                "entropy/policy": 1.5 / step + 0.1 * seed,
                "grad_norm": 1.0 + seed,
                "completion_length": 100.0 + step,
                "time/step": 0.5 + 0.25 * seed,
                **more,
            }
        if step % 10 == 0:
            row |= {"eval/avg_at_k": 0.4 + 0.01 * step + 0.02 * seed, "eval/pass_at_2": 0.9}
        found.append(row)
    return found


def problem(number: int, rewards: list[float], texts: list[str] | None = None) -> Problem:
    texts = texts or [f"text {number}.{i}" for i in range(len(rewards))]
    return Problem(f"p{number}", f"{number}+{number}=", f"{2 * number}", texts, rewards, [1, 1],
                   [True, True])  # fmt: skip


def write_evaluation(folder: Path, step: int, problems: list[Problem]) -> None:
    """As `Evaluation.write`, without the seconds that its intervals take."""
    evaluations = folder / "evaluations"
    evaluations.mkdir(exist_ok=True)
    lines = [json.dumps(asdict(found)) + "\n" for found in problems]
    (evaluations / f"step-{step}.jsonl").write_text("".join(lines))
    (evaluations / f"step-{step}.json").write_text('{"avg_at_k_interval": [0.25, 0.875]}')


def write(
    folder: Path,
    metrics: list[dict] | None = None,
    sources: dict | None = None,
    **changes: dict,
) -> Path:
    """A run whose second problem is solved in the end, and whose third is no longer."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(to_tables(config(folder, **changes))))
    lines = [json.dumps(row) + "\n" for row in (rows() if metrics is None else metrics)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if sources is not None:
        (folder / "sources.json").write_text(json.dumps(sources))
    before = [problem(1, [1.0, 1.0]), problem(2, [0.0, 0.0]), problem(3, [1.0, 0.0])]
    after = [problem(1, [1.0, 1.0]), problem(2, [0.0, 1.0], ["no", HOSTILE]),
             problem(3, [0.0, 0.0])]  # fmt: skip
    write_evaluation(folder, 0, before)
    write_evaluation(folder, 40, after)
    (folder / "completions").mkdir()
    sample = {"prompt": HOSTILE, "completion": "c", "answer": "a", "reward": 1.0, "advantage": -0.5}
    (folder / "completions" / "step-1.jsonl").write_text(json.dumps(sample) + "\n")
    return folder
