"""Training curves and pass@k curves as PNG files.

The panels follow figure 5 of the paper: does the reward rise, do the divergences move with the sign
of the advantage, does the lens keep its entropy, do completions grow, are the gradients steady.
Figures are built without pyplot and its global state, so that any thread may draw one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from oisd.jsonl import read_rows

Row = Mapping[str, Any]
Curves = Mapping[str, Mapping[int, float]]
Intervals = Mapping[str, Mapping[int, tuple[float, float]]]

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, SKY, AMBER = "#CC79A7", "#56B4E9", "#E69F00"
INK, GRID = "#333333", "#E4E4E4"
_DPI = 150

# Points above which a smoothed line is drawn over the raw one.
_SMOOTH_ABOVE = 30


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    """Metric, label and colour of each line."""
    points: tuple[str, str, str] | None = None
    """Metric, label and colour of markers measured at some steps only."""
    own_axes: bool = False
    """Give each of two lines its own axis where one would flatten both."""
    finish: Callable[[Axes], None] | None = None
    scale: float = 1
    """Multiplies what the lines show."""


def _finish_reward(ax: Axes) -> None:
    """Show rewards within [0, 1] on the whole of that range; others keep their own."""
    low, high = ax.dataLim.intervaly
    if low >= 0 and high <= 1:
        ax.set_ylim(-0.02, 1.02)


def _finish_divergence(ax: Axes) -> None:
    """Mark ln 2, the maximum of the Jensen-Shannon divergence, if in view or just above."""
    low, high = ax.get_ylim()
    if low <= math.log(2) <= high + 0.25 * (high - low):
        ax.axhline(math.log(2), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            "ln 2", (1, math.log(2)), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=INK,
        )  # fmt: skip


def _finish_shares(ax: Axes) -> None:
    """Use a logarithmic axis, and mark 1 %, below which no effect is to be expected."""
    if ax.dataLim.minposy > 0:
        ax.set_yscale("log")
    ax.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))


def _finish_gradients(ax: Axes) -> None:
    """Use a logarithmic axis if parts of the gradient differ by orders of magnitude."""
    if ax.dataLim.minposy > 0 and ax.dataLim.ymax > 20 * max(ax.dataLim.ymin, 0):
        ax.set_yscale("log")


def _by_sign(name: str, title: str) -> _Panel:
    lines = ((f"js/{name}_pos", "advantage > 0", BLUE), (f"js/{name}_neg", "advantage < 0", ORANGE))
    return _Panel(f"js_{name}", title, "divergence (nats)", lines, finish=_finish_divergence)


_PANELS = (
    _Panel(
        "reward", "Reward", "mean reward", (("reward", "training", BLUE),),
        points=("eval/avg_at_k", "evaluation (avg@k)", ORANGE), finish=_finish_reward,
    ),
    _by_sign("think", "Logit alignment"),
    _by_sign("attention", "Attention alignment"),
    _Panel(
        "entropy", "Next-token entropy", "entropy (nats)",
        (("entropy/student", "student layer (logit lens)", ORANGE),
         ("entropy/teacher", "final layer", BLUE)),
        own_axes=True,
    ),
    _Panel(
        "completion_length", "Completion length", "mean length (tokens)",
        (("completion_length", "training", BLUE),),
    ),
    _Panel(
        "gradient_norms", "Gradient norms", "L2 norm",
        (("grad_norm", "total", INK), ("grad_norm/grpo", "GRPO", BLUE),
         ("grad_norm/think", "logit", AMBER), ("grad_norm/attention", "attention", GREEN)),
        finish=_finish_gradients,
    ),
    _Panel(
        "shares", "Share of the update", "gradient norm, % of GRPO's",
        (("share/think", "logit", AMBER), ("share/attention", "attention", GREEN)),
        finish=_finish_shares, scale=100,
    ),
    _Panel(
        "weights", "Weights of the alignment", "weight",
        (("weight/think", "logit", AMBER), ("weight/attention", "attention", GREEN)),
        finish=_finish_gradients,
    ),
)  # fmt: skip


def plot_training(metrics: str | Path | Iterable[Row], out_dir: str | Path) -> list[Path]:
    """Draw the curves of a run and return the files: `training.png` and one for each panel.

    metrics: the run's metrics.jsonl or its rows; a row may lack any metric or hold null.
    A panel without data is left out; of a run without any, nothing is drawn. Of rows with the same
    step, as a resumed run may leave, the last one counts. A file's last line may be unfinished.
    Raises ValueError for a file with another damaged line, and OSError for a missing one.
    """
    if isinstance(metrics, (str, Path)):
        os.stat(metrics)  # to `read_rows` a missing file has no rows
        metrics = read_rows(Path(metrics))[0]
    rows = list(metrics)
    panels = [panel for panel in _PANELS if _has_data(panel, rows)]
    if not panels:
        return []

    out_dir = Path(out_dir)
    columns = {2: 2, 4: 2, 7: 4, 8: 4}.get(len(panels), min(3, len(panels)))
    lines = math.ceil(len(panels) / columns)
    overview = Figure(
        figsize=(4.3 * columns, 3.3 * lines), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1)
    )
    for place, panel in enumerate(panels, start=1):
        _draw_panel(overview.add_subplot(lines, columns, place), panel, rows)
    paths = [save_figure(overview, out_dir / "training.png")]
    for panel in panels:
        figure = Figure(figsize=(6, 4), layout="constrained")
        _draw_panel(figure.add_subplot(), panel, rows)
        paths.append(save_figure(figure, out_dir / f"{panel.name}.png"))
    return paths


def plot_pass_at_k(curves: Curves, path: str | Path, intervals: Intervals | None = None) -> Path:
    """Draw pass@k against k on a logarithmic axis and return the file.

    curves: for each run, pass@k in [0, 1] by k.
    intervals: for some of the runs, (lower, upper) bounds in [0, 1] by k, drawn as bands.
    Raises ValueError when there is no point to draw.
    """
    if not any(curves.values()):
        raise ValueError("plot_pass_at_k: curves holds no points; wanted {name: {k: pass@k}}")
    figure = Figure(figsize=(6, 4), layout="constrained")
    _draw_pass_at_k(figure.add_subplot(), "Pass@k", curves, intervals or {}, list(curves))
    return save_figure(figure, Path(path))


def plot_pass_at_k_panels(
    panels: Mapping[str, Curves], path: str | Path, intervals: Mapping[str, Intervals] | None = None
) -> Path:
    """Draw a panel of pass@k for each benchmark, as in figure 3 of the paper; return the file.

    panels: for each benchmark, curves as `plot_pass_at_k` takes them. A run may lack a benchmark,
        and keeps its colour. intervals: likewise.
    Raises ValueError when there is no point to draw.
    """
    panels = {title: curves for title, curves in panels.items() if any(curves.values())}
    if not panels:
        raise ValueError("plot_pass_at_k_panels: panels holds no points to draw")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.0 * columns, 3.3 * lines), layout="constrained")
    for place, (title, curves) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(lines, columns, place)
        _draw_pass_at_k(ax, title, curves, (intervals or {}).get(title, {}), names)
    return save_figure(figure, Path(path))


_LEAST_PERCENT = 6


def _draw_pass_at_k(
    ax: Axes, title: str, curves: Curves, intervals: Intervals, names: Sequence[str]
) -> None:
    """One panel; a curve's place in `names` gives it its colour."""
    styles = list(zip((BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY), "osD^vP", strict=True))
    for name, curve in curves.items():
        colour, marker = styles[names.index(name) % len(styles)]
        ks = sorted(curve)
        ax.plot(
            ks, [100 * curve[k] for k in ks], color=colour, linewidth=1.8, marker=marker,
            markersize=4.5, markeredgecolor="white", markeredgewidth=0.7, label=name,
        )  # fmt: skip
        band = intervals.get(name, {})
        ks = sorted(band)
        lower, upper = ([100 * band[k][side] for k in ks] for side in (0, 1))
        ax.fill_between(ks, lower, upper, color=colour, alpha=0.15, linewidth=0)
    ks = sorted({k for curve in curves.values() for k in curve})
    ax.set_xscale("log", base=2)
    # At most ten, so that their labels do not touch.
    ax.xaxis.set_major_locator(FixedLocator(ks[:: math.ceil(len(ks) / 10)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    style_axes(ax, title, "k (samples per problem)", "problems solved")
    # Shares of problems: within 0 to 100 %, and not so close that two ticks have one label.
    low, high = ax.get_ylim()
    low, high = max(min(low, high - _LEAST_PERCENT), -1), min(high, 101)
    ax.set_ylim(low, max(high, low + _LEAST_PERCENT))
    if len(curves) > 1:
        ax.legend(fontsize=9, labelcolor=INK, framealpha=0.85, edgecolor="none")


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, without the rows that have none.

    Steps with equal rewards in each group have gradient 0, which a logarithmic axis cannot show;
    nor can it show a term that reaches no trained weight.
    """
    values: dict[float, float] = {}
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if step is None or value is None or not math.isfinite(value):
            continue
        if value or not key.startswith(("grad_norm", "share")):
            values[step] = value
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _has_data(panel: _Panel, rows: Sequence[Row]) -> bool:
    series = [*panel.lines, *([panel.points] if panel.points else [])]
    return any(_series(rows, key)[0] for key, _, _ in series)


def _draw_panel(ax: Axes, panel: _Panel, rows: Sequence[Row]) -> None:
    style_axes(ax, panel.title, "training step", panel.unit, title_pad=19)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    lines = []
    for key, label, colour in panel.lines:
        steps, values = _series(rows, key)
        if steps:
            lines.append((steps, [panel.scale * value for value in values], label, colour))
    axes = [ax] * len(lines)
    if panel.own_axes and len(lines) == 2 and _far_apart(lines[0][1], lines[1][1]):
        axes = [ax, _right_axes(ax, panel.unit)]
        for own, (*_, colour) in zip(axes, lines, strict=True):
            own.yaxis.label.set_color(colour)
            own.tick_params(axis="y", colors=colour)
    for own, line in zip(axes, lines, strict=True):
        _draw_line(own, *line)
    if panel.points is not None:
        key, label, colour = panel.points
        steps, values = _series(rows, key)
        if steps:
            ax.plot(
                steps, values, "D", color=colour, markersize=5.5, markeredgecolor="white",
                markeredgewidth=0.8, label=label, zorder=3,
            )  # fmt: skip
    if panel.finish is not None:
        panel.finish(ax)
    legend_above(ax, [handle for own in dict.fromkeys([ax, *axes]) for handle in own.lines])


def _right_axes(ax: Axes, y_label: str) -> Axes:
    right = ax.twinx()
    right.set_ylabel(y_label, fontsize=10)
    right.tick_params(axis="y", labelsize=9, length=3, width=0.8)
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_color(INK)
    right.spines["right"].set_linewidth(0.8)
    return right


def legend_above(ax: Axes, lines: Sequence[Line2D]) -> None:
    """A legend between title and axes, where it hides no data."""
    handles = [line for line in lines if not str(line.get_label()).startswith("_")]
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0,
        ncols=4, fontsize=8.5, labelcolor=INK, frameon=False, handlelength=1.2, handletextpad=0.5,
        columnspacing=1.2,
    )  # fmt: skip


def _draw_line(
    ax: Axes, steps: Sequence[float], values: Sequence[float], label: str, colour: str
) -> None:
    if len(steps) > _SMOOTH_ABOVE:
        ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        ax.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)
    else:
        marker = "o" if len(steps) == 1 else ""
        ax.plot(steps, values, color=colour, linewidth=1.5, marker=marker, label=label)


def _far_apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the gap between two series is so wide that it hides the changes of both."""
    gap = max(min(a) - max(b), min(b) - max(a))
    return gap > 2 * (max(a) - min(a) + max(b) - min(b))


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over a fifteenth of the run, cut off at both ends."""
    n = len(values)
    half = max(2, n // 30)
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(n)
    start, end = np.maximum(i - half, 0), np.minimum(i + half + 1, n)
    return (total[end] - total[start]) / (end - start)


def style_axes(ax: Axes, title: str, x_label: str, y_label: str, title_pad: float = 8) -> None:
    ax.set_title(title, fontsize=11.5, fontweight="bold", color=INK, loc="left", pad=title_pad)
    ax.set_xlabel(x_label, fontsize=10, color=INK)
    ax.set_ylabel(y_label, fontsize=10, color=INK)
    ax.tick_params(colors=INK, labelsize=9, length=3, width=0.8)
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.spines[["left", "bottom"]].set_linewidth(0.8)
    ax.margins(x=0.02)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write through a temporary file, so that a viewer never reads half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
