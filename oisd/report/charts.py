"""Charts as SVG elements inside a page: their text is text, their colours are the page's.

Lines differ in colour, dashes and markers, so that they are told apart in black and white too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oisd.plots import AMBER, BLUE, GREEN, GRID, INK, ORANGE, PURPLE, SKY, style_axes
from oisd.report.curves import Chart, Curve

# Colours of the drawing and what they are called in page.html, which has them for dark pages too.
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
_NAMES = {colour: f"var(--series-{place})" for place, colour in enumerate(_COLOURS, start=1)}
_NAMES |= {INK: "var(--ink)", GRID: "var(--line)"}
_DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.4)), (0, (7, 2, 1.5, 2)), (0, (3, 1.2)), (0, (9, 3)))
_MARKERS = "os^DvP"
_SIZE = 4.7, 3.0  # inches: a third of a desktop's page, all of a telephone's


@dataclass(frozen=True)
class LayerCurve:
    """A value for each of some layers."""

    label: str
    layers: Sequence[int]
    values: Sequence[float]


def draw(chart: Chart) -> Markup:
    """The chart as an SVG element."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.add_subplot()
    style_axes(ax, "", "training step", chart.unit)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    if chart.logarithmic:
        ax.set_yscale("log")
    for curve in chart.curves:
        _draw_curve(ax, curve.thinned(), curve.is_smoothed)
    if chart.limits:
        ax.set_ylim(*chart.limits)
    low, high = ax.get_ylim()
    if chart.ceiling is not None and low <= chart.ceiling <= high + 0.25 * (high - low):
        ax.axhline(chart.ceiling, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.annotate("ln 2", (1, chart.ceiling), xycoords=("axes fraction", "data"), fontsize=8.5,
                    xytext=(3, 0), textcoords="offset points", va="center", color=INK)  # fmt: skip
    _legend(figure, ax, least=1 if chart.is_of_groups else 2)
    return _svg(figure, chart.name, chart.words)


def draw_layers(name: str, unit: str, curves: Sequence[LayerCurve], marked: int) -> Markup:
    """Values by layer, of several models, with a line at the layer `marked`."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    ax = figure.add_subplot()
    style_axes(ax, "", "layer", unit)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    for place, curve in enumerate(curves):
        ax.plot(
            curve.layers, curve.values, label=_plain(curve.label), markersize=4, **_style(place)
        )
    ax.axvline(marked, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    largest = max(max(curve.values) for curve in curves)
    ax.set_ylim(0, 1.06 * largest if largest > 0 else 1)
    _legend(figure, ax, least=1)
    words = " ".join(
        f"{c.label}: {', '.join(f'{v:.4g}' for v in c.values)} for layers "
        f"{c.layers[0]} to {c.layers[-1]}."
        for c in curves
    )
    return _svg(figure, name, f"{unit} by layer. {words}")


def _style(place: int) -> dict[str, Any]:
    """Colour, dashes and marker of the n-th line."""
    turn = place + place // len(_COLOURS)  # the seventh line has another pair
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "linestyle": _DASHES[turn % len(_DASHES)],
        "marker": _MARKERS[turn % len(_MARKERS)],
    }


def _draw_curve(ax: Axes, curve: Curve, smoothed: bool) -> None:
    style = _style(curve.place)
    steps, many = curve.steps, len(curve.steps) > 12
    if not np.array_equal(curve.low, curve.high):
        ax.fill_between(steps, curve.low, curve.high, color=style["color"], alpha=0.18,
                        linewidth=0)  # fmt: skip
    elif smoothed:
        ax.plot(steps, curve.mean, color=style["color"], linewidth=0.7, alpha=0.4)
    # Few markers on a long line, at other places than its neighbours'.
    every = max(1, len(steps) // 7)
    shown = slice((curve.place * every // 4) % every, None, every) if many else slice(None)
    ax.plot(steps, curve.line, linewidth=1.9, label=_plain(curve.label), markersize=4.5,
            markevery=shown, **style)  # fmt: skip


def _plain(label: str) -> str:
    """A label that matplotlib does not read as a formula."""
    return label.replace("$", r"\$")


def _legend(figure: Figure, ax: Axes, least: int) -> None:
    """Above the axes, where it hides no data, from `least` lines on."""
    handles = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    if len(handles) >= least:
        longest = max(len(str(line.get_label())) for line in handles)
        figure.legend(
            handles=handles, loc="outside upper left", ncols=2 if longest < 24 else 1,
            fontsize=9, labelcolor=INK, frameon=False, handlelength=3.2, borderpad=0.1,
        )  # fmt: skip


def _svg(figure: Figure, name: str, words: str) -> Markup:
    """The figure as an SVG element whose ids begin with `name`, and with `words` for its text."""
    stream = io.StringIO()
    # Text as text can be read and searched; equal figures have equal ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "oisd"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">") + 1 :]
    # Two decimals of a point are enough, but in places alone, not in what is written.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    # Groups are numbered anew in each figure; nothing refers to them.
    body = re.sub(r' id="[A-Za-z0-9]*_?[A-Za-z]*_\d+"', "", body)
    body = re.sub(r' id="', f' id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in _NAMES.items():
        body = body.replace(colour.lower(), variable)
    label = Markup.escape(words)
    return Markup(f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{body}')
