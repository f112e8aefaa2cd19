"""The plots and the summary of a finished run, from its own files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from oisd.plots import plot_pass_at_k, plot_training
from oisd.run.folder import RunFolder
from oisd.weights import TERMS


def summarize(folder: RunFolder, step: int) -> dict[str, Any]:
    """Write plots and summary.json of a run of `step` steps; returns the summary."""
    rows = folder.metrics()
    plots = plot_training(rows, folder.plots)
    evaluations = sorted(
        folder.evaluations.glob("step-*.json"),
        key=lambda file: int(file.stem.removeprefix("step-")),
    )
    curves, intervals = {}, {}
    for file in [*evaluations[:1], *evaluations[1:][-1:]]:
        found = json.loads(file.read_text(encoding="utf-8"))
        name = file.stem.replace("-", " ")
        curves[name] = {int(k): v for k, v in found["pass_at_k"].items()}
        intervals[name] = {int(k): tuple(v) for k, v in found["pass_at_k_interval"].items()}
    if curves:
        plot_pass_at_k(curves, folder.plots / "pass_at_k.png", intervals)
    trained = [row for row in rows if row["step"] > 0]
    tail = max(1, min(10, len(trained) // 4))
    summary: dict[str, Any] = {
        "steps": step,
        "checkpoint": str(folder.checkpoints / f"step-{step}"),
        "plots": [str(p) for p in plots],
    }
    if alarms := [line for row in rows for line in row.get("alarms", ())]:
        summary["alarms"] = alarms
    if trained:
        summary["reward_first"] = _mean([r["reward"] for r in trained[:tail]])
        summary["reward_last"] = _mean([r["reward"] for r in trained[-tail:]])
        summary["seconds_per_step"] = _mean([r["time/step"] for r in trained])
    if shares := _shares(trained):
        summary["alignment"] = shares
    evaluated = [row for row in rows if "eval/avg_at_k" in row]
    if evaluated:
        summary["eval_before"] = evaluated[0]["eval/avg_at_k"]
        summary["eval_after"] = evaluated[-1]["eval/avg_at_k"]
        last = json.loads(evaluations[-1].read_text(encoding="utf-8"))
        summary["eval_interval"] = last["avg_at_k_interval"]
    (folder.path / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    return summary


def _shares(rows: Sequence[dict[str, Any]]) -> str:
    """How much of the update the alignment was, in a line; "" for a run that did not measure it."""
    found = {}
    for term in TERMS:
        values = [row[f"share/{term}"] for row in rows if row.get(f"share/{term}") is not None]
        if values:
            found[term] = f"{term} {100 * statistics.median(values):.2g} %"
    return f"{', '.join(found.values())} of GRPO's gradient (medians)" if found else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
