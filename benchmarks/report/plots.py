"""Plots of results: time and memory against tokens and layers, and bars of the roofline."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.report.bars import Row
from oisd.plots import INK, save_figure, style_axes

# Okabe and Ito's palette, safe for any colour vision; ours is always blue.
BLUES = ("#0072B2", "#56B4E9", "#00456B", "#8FCBEB")
OTHERS = ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#7A7A7A", "#B3A100", "#8B4513", "#4B0082")
MARKERS = "osD^vP*X"
NAMES = {
    "lens": "Lens divergence with gradient",
    "lens-values": "Lens divergence, values",
    "linear_logprob": "Log-probability of labels",
    "policy_head": "Policy head",
    "attention_divergence": "Attention divergence",
    "attention": "Attention",
    "attention_backward": "Attention backward with alignment",
    "step": "Training step",
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """All plots that the rows have data for; the files."""
    timed = [row for row in rows if row["kind"] == "measurement" and row["status"] == "ok"]
    paths = []
    for family in NAMES:
        chosen = [row for row in timed if row["family"] == family]
        for axis, label in (("tokens", "tokens"), ("layers", "student layers")):
            for name, line in sweeps(chosen, axis).items():
                path = folder / f"{family}_{name}_by_{axis}.png".replace("/", "-")
                paths.append(draw_sweep(line, axis, label, NAMES[family], name, path))
    if timed:
        paths.append(draw_roofline(timed, folder / "roofline.png"))
    return paths


def place(row: Row, axis: str) -> int:
    """Tokens or layers of a row; 0 if its family has no sweep over them."""
    shape = row["shape"]
    if axis == "layers":
        return shape.get("S", 0) if row["family"] in ("lens", "policy_head") else 0
    return shape.get("N", shape.get("T", 0))


def sweeps(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """Rows that differ only along the axis, by the rest of the case's name; at least two points."""
    varies = re.compile(r"S\d+" if axis == "layers" else r"\d+k?")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if place(row, axis):
            kept = [part for part in row["case"].split("/")[1:] if not varies.fullmatch(part)]
            groups.setdefault("/".join(kept), []).append(row)
    return {name: found for name, found in groups.items()
            if len({place(row, axis) for row in found}) > 1}  # fmt: skip


def colours(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each implementation: ours in blues."""
    mine, others = cycle(BLUES), cycle(OTHERS)
    return {name: (next(mine if is_ours(name) else others), marker)
            for name, marker in zip(names, cycle(MARKERS), strict=False)}  # fmt: skip


def is_ours(name: str) -> bool:
    return name.startswith(("ours", "OISD ours"))


def draw_sweep(
    rows: Sequence[Row], axis: str, label: str, title: str, subtitle: str, path: Path
) -> Path:
    """Time and peak memory side by side, both axes logarithmic."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    look = colours(names)
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    time, memory = figure.subplots(1, 2)
    xs = sorted({place(row, axis) for row in rows})
    for name in names:
        mine = sorted((row for row in rows if row["implementation"] == name),
                      key=lambda row: place(row, axis))  # fmt: skip
        colour, marker = look[name]
        style = dict(color=colour, marker=marker, markersize=5, linewidth=1.8, label=name,
                     markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
        at = [place(row, axis) for row in mine]
        time.plot(at, [row["median_s"] * 1e3 for row in mine], **style)
        time.fill_between(at, [row["p20_s"] * 1e3 for row in mine],
                          [row["p80_s"] * 1e3 for row in mine], color=colour, alpha=0.13,
                          linewidth=0)  # fmt: skip
        kept = [(x, row["peak_mib"]) for x, row in zip(at, mine, strict=True)
                if (row.get("peak_mib") or 0) > 0]  # fmt: skip
        if kept:
            memory.plot(*zip(*kept, strict=True), **style)
    counted = "in all (MiB)" if rows[0]["family"] == "step" else "beyond inputs (MiB)"
    for ax, heading, unit in ((time, "Time", "median (ms)"), (memory, "Peak memory", counted)):
        style_axes(ax, heading, label, unit)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(FixedLocator(xs))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        readable(ax)
    figure.suptitle(f"{title}: {subtitle}  ({rows[0]['device']}, {rows[0]['dtype']})",
                    fontsize=11.5, fontweight="bold", color=INK, x=0.01, ha="left")  # fmt: skip
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(4, len(names)),
                  fontsize=9, frameon=False, labelcolor=INK)  # fmt: skip
    return save_figure(figure, path)


def draw_roofline(rows: Sequence[Row], path: Path) -> Path:
    """Percent of the roofline, the largest case of each family."""
    chosen = []
    for family in NAMES:
        found = [row for row in rows if row["family"] == family]
        if found:
            largest = max(found, key=lambda row: row["floor_flops"])["case"]
            chosen.append([row for row in found if row["case"] == largest])
    count = sum(len(group) + 1.4 for group in chosen)
    figure = Figure(figsize=(8.6, 0.55 + 0.29 * count), layout="constrained")
    ax = figure.add_subplot()
    y, ticks, labels = 0.0, [], []
    for group in chosen:
        ax.text(0, y, group[0]["case"], fontsize=9.5, fontweight="bold", color=INK, va="center")
        y += 1
        for row in sorted(group, key=lambda row: -row["roofline_percent"]):
            percent = row["roofline_percent"]
            colour = BLUES[0] if is_ours(row["implementation"]) else "#A9A9A9"
            ax.barh(y, percent, height=0.72, color=colour)
            inside = percent > 88
            figures = f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %"
            ax.text(percent - 1 if inside else percent + 1, y, figures, fontsize=8.5, va="center",
                    ha="right" if inside else "left",
                    color="white" if inside else INK)  # fmt: skip
            ticks.append(y)
            labels.append(row["implementation"])
            y += 1
        y += 0.4
    title = f"Share of the physical limit  ({rows[0]['device']})"
    style_axes(ax, title, "% of the bare matmul's (or the copy's) rate", "")
    ax.set_yticks(ticks, labels, fontsize=9)
    ax.set_ylim(y - 0.3, -0.8)
    ax.set_xlim(0, max(100, *(row["roofline_percent"] for group in chosen for row in group)) * 1.02)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    return save_figure(figure, path)


def readable(ax: Axes) -> None:
    """Ticks at 1, 2, 5 if the range is narrow, at powers of ten if it is wide."""
    low, high = ax.dataLim.intervaly
    if low <= 0 or not math.isfinite(high):
        return
    narrow = math.log10(high / low) < 2.2
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    ax.set_ylim(low / 1.5, high * 1.5)


def short(x: float) -> str:
    return f"{x / 1024:.0f}k" if x >= 1024 and x % 1024 == 0 else f"{x:.0f}"
