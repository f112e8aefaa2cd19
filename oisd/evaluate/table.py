"""Evaluations side by side: the layout of the paper's table 1 and of its figure 3.

A row is a model, a column a benchmark with its Avg@K. The last column is the mean of the paper's
four benchmarks, with equal weights, for models that have all four. Numbers are in per cent, with
95 % bootstrap intervals over the problems: of thirty problems, one is 3.3 points.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from oisd.config import ConfigError
from oisd.data.catalogue import DATA_SETS, PAPER_BENCHMARKS
from oisd.evaluate import bootstrap_interval_of_mean
from oisd.plots import plot_pass_at_k_panels

Summary = dict[str, Any]


def read_summaries(folder: str | Path) -> list[Summary]:
    """What `oisd eval --benchmark` left under a folder, in the order of the paper's columns.

    Raises ConfigError if there is nothing.
    """
    found = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(Path(folder).glob("*/summary.json"))
    ]
    found = [summary for summary in found if summary.get("benchmark") in DATA_SETS]
    if not found:
        raise ConfigError(
            f"{folder} holds no finished benchmark; wanted the output folder of "
            f"`oisd eval MODEL --benchmark ...`"
        )
    order = list(DATA_SETS)
    return sorted(found, key=lambda summary: order.index(summary["benchmark"]))


def table_cells(runs: dict[str, Sequence[Summary]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text. `runs`: the summaries of each model."""
    names = [n for n in DATA_SETS if any(s["benchmark"] == n for r in runs.values() for s in r)]
    found = {run: {s["benchmark"]: s for s in summaries} for run, summaries in runs.items()}
    header = ["Model"]
    for name in names:
        samples = {by[name]["samples"] for by in found.values() if name in by}
        header.append(f"{DATA_SETS[name].title} (Avg@{'/'.join(map(str, sorted(samples)))})")
    rows = []
    for run, by in found.items():
        cells = [_cell(by[name]) if name in by else "" for name in names]
        rows.append([run, *cells, _mean_cell(by, "problem_means")])
        second = {n: s["graders"] for n, s in by.items() if s["graders"]}
        if second:
            label = next(iter(second.values()))["second"]
            other = [_second_cell(second[n]) if n in second else "" for n in names]
            rows.append([f"  by {label}", *other, _mean_cell(second, "second_problem_means")])
            agreed = [f"{100 * second[n]['agreement']:.1f} %" if n in second else "" for n in names]
            rows.append(["  graders agree on", *agreed, ""])
    return [*header, "Mean of the four"], rows


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.2f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _cell(summary: Summary) -> str:
    mark = "*" if summary["problems_expected"] not in (None, summary["problems"]) else ""
    return _percent(summary["avg_at_k"], summary["avg_at_k_interval"]) + mark


def _second_cell(graders: dict[str, Any]) -> str:
    return _percent(graders["second_avg_at_k"], graders["second_avg_at_k_interval"])


def _mean_cell(by: dict[str, Any], field: str) -> str:
    if any(name not in by for name in PAPER_BENCHMARKS):
        return ""
    groups = [by[name][field] for name in PAPER_BENCHMARKS]
    mean = sum(sum(means) / len(means) for means in groups) / len(groups)
    return _percent(mean, bootstrap_interval_of_mean(groups, resamples=2000))


def notes(runs: dict[str, Sequence[Summary]]) -> list[str]:
    """What a reader of the table must know: incomplete sets, completions cut off."""
    lines = []
    for run, summaries in runs.items():
        for s in summaries:
            title = DATA_SETS[s["benchmark"]].title
            if s["problems_expected"] not in (None, s["problems"]):
                lines.append(
                    f"* {run}, {title}: {s['problems']} problems, where the benchmark has "
                    f"{s['problems_expected']}"
                )
            if s["frac_finished"] < 1:
                lines.append(
                    f"{run}, {title}: {100 * (1 - s['frac_finished']):.1f} % of the completions "
                    f"reached the length limit"
                )
    return lines


def rich_table(runs: dict[str, Sequence[Summary]]) -> Table:
    """The table for a terminal."""
    header, rows = table_cells(runs)
    table = Table(title="Accuracy in per cent [95 % interval over the problems]")
    for i, title in enumerate(header):
        # A narrow terminal may wrap an interval, but must not cut off the name of a row.
        table.add_column(title, justify="right" if i else "left", no_wrap=i == 0)
    for name, *cells in rows:
        table.add_row(name, *(cell.replace(" [", "\n[") for cell in cells))
    return table


def markdown(runs: dict[str, Sequence[Summary]]) -> str:
    """The table as Markdown, with its notes."""
    header, rows = table_cells(runs)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + "".join(f"\n{note}\n" for note in notes(runs))


def write(runs: dict[str, Sequence[Summary]], folder: str | Path) -> list[Path]:
    """Write table.md and pass_at_k.png, a panel for each benchmark and one for the mean."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "table.md"
    table.write_text(markdown(runs), encoding="utf-8")
    panels: dict[str, dict[str, dict[int, float]]] = {}
    bands: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for run, summaries in runs.items():
        curves = {}
        for s in summaries:
            title = DATA_SETS[s["benchmark"]].title
            curves[s["benchmark"]] = {int(k): v for k, v in s["pass_at_k"].items()}
            panels.setdefault(title, {})[run] = curves[s["benchmark"]]
            intervals = {int(k): (v[0], v[1]) for k, v in s["pass_at_k_interval"].items()}
            bands.setdefault(title, {})[run] = intervals
        if all(name in curves for name in PAPER_BENCHMARKS):
            four = [curves[name] for name in PAPER_BENCHMARKS]
            ks = set.intersection(*(set(curve) for curve in four))
            mean = {k: sum(curve[k] for curve in four) / 4 for k in sorted(ks)}
            panels.setdefault("Mean of the four", {})[run] = mean
    order = [*(s.title for s in DATA_SETS.values()), "Mean of the four"]
    panels = {title: panels[title] for title in order if title in panels}
    return [table, plot_pass_at_k_panels(panels, folder / "pass_at_k.png", bands)]
