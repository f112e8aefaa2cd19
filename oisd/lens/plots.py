"""Pictures of the logit lens and of attention overlap: PNG files in the manner of figures 2, 6, 7.

plot_lens       layers by tokens: top token, shade its probability, outlined where it is the
                final layer's
plot_layers     divergence, entropy and agreement of every layer
plot_compare    one layer and the final one of two models on the same text
plot_attention  which tokens the last queries look at, in a layer and in the final one
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from oisd.lens import LensSummary
from oisd.lens.attention import AttentionOverlap
from oisd.plots import BLUE, GREEN, INK, ORANGE, save_figure, style_axes

_CELL = 0.62  # inches
_SHADES = "Blues"
_MARGIN = "#111111"
# Tokens come in every script; of these fonts, those installed are used, in this order.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans",
          "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei",
          "WenQuanYi Zen Hei", "Arial Unicode MS")  # fmt: skip
_CAPTION = "columns: tokens read; cells: likeliest next token; outlined: the final layer's choice"


class Picture(NamedTuple):
    """Decoded cells of the lens on the last P tokens of a text."""

    tokens: list[str]  # [P], what the model has read
    top: list[list[str]]  # [L][P]
    probability: list[list[float]]  # [L][P]
    agrees: list[list[bool]]  # [L][P]


def shown_layers(layers: int, most: int = 20, also: int | None = None) -> list[int]:
    """At most `most` layers, counted from 1, evenly spread, with the final one; and `also`."""
    step = math.ceil(layers / most)
    return sorted({*range(layers, 0, -step), *([also] if also else [])})


def plot_lens(
    picture: Picture, path: str | Path, *, title: str = "Logit lens", layer: int | None = None
) -> Path:
    """Draw layers by tokens, the final layer on top; at most 20 of them, evenly spread.

    layer: shown in any case, and marked.
    """
    layers = shown_layers(len(picture.top), also=layer)
    names = ["final" if number == len(picture.top) else str(number) for number in layers]
    if layer:
        names[layers.index(layer)] += " \u25c0"
    rows = [_row(picture, number) for number in layers]
    figure = _grid_figure(rows[::-1], names[::-1], picture.tokens, title)
    return save_figure(figure, Path(path))


def plot_compare(
    pictures: Sequence[tuple[str, Picture]], layer: int, path: str | Path, *, title: str
) -> Path:
    """Draw `layer` and the final layer of several models on one text, a pair of rows each."""
    rows, names = [], []
    for name, picture in pictures:
        rows += [_row(picture, len(picture.top)), _row(picture, layer)]
        names += [f"{name}, final", f"{name}, layer {layer}"]
    figure = _grid_figure(rows, names, pictures[0][1].tokens, title)
    return save_figure(figure, Path(path))


def plot_layers(summaries: Sequence[tuple[str, LensSummary]], path: str | Path) -> Path:
    """Draw mean divergence, entropy and agreement by layer, for one model or several."""
    figure = Figure(figsize=(11.4, 3.5 + 0.2 * len(summaries)), layout="constrained")
    axes = [figure.add_subplot(1, 3, place) for place in (1, 2, 3)]
    titles = (
        ("Divergence from the final layer", "divergence (nats)"),
        ("Entropy of the lens", "entropy (nats)"),
        ("Same top token as the final layer", "share of tokens"),
    )
    for ax, (title, unit) in zip(axes, titles, strict=True):
        style_axes(ax, title, "layer", unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    colours = (BLUE, ORANGE, GREEN)
    for number, (name, summary) in enumerate(summaries):
        colour = colours[number % len(colours)]
        layers = range(1, len(summary.entropy) + 1)
        series = (summary.divergence, summary.entropy, summary.agreement)
        for ax, values in zip(axes, series, strict=True):
            ax.plot(layers, values, color=colour, marker="o", markersize=3, label=name)
        if summary.boundary_layer is not None:
            height = summary.entropy[summary.boundary_layer - 1]
            axes[1].plot(
                [summary.boundary_layer], [height], "D", color=colour, markersize=8,
                markeredgecolor=INK, label=f"{name}, boundary: layer {summary.boundary_layer}",
            )  # fmt: skip
    for ax in axes:
        # Room for the markers: curves of nearly equal numbers have no margin once 0 is in view.
        largest = max(float(y) for line in ax.lines for y in np.ravel(line.get_ydata()))
        ax.set_ylim(0, 1.06 * largest if largest > 0 else 1)
    axes[2].set_ylim(0, 1.03)
    # One for all panels, below them: names of checkpoints are longer than a panel is wide.
    figure.legend(
        handles=axes[1].lines, loc="outside lower left", ncols=2 if len(summaries) > 1 else 4,
        fontsize=9, frameon=False, labelcolor=INK,
    )  # fmt: skip
    return save_figure(figure, Path(path))


def plot_attention(
    overlap: AttentionOverlap,
    tokens: Sequence[str],
    layer: int,
    path: str | Path,
    *,
    most: int = 40,
    others: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Draw what the last query attends to in `layer` and in the final layer, and overlap by layer.

    tokens: of the whole text; the last `most` are shown.
    others: mean overlap of other models, by name, drawn beside this one's: of layer 1, 2 and so
        on, NaN where a layer has none.
    Raises ValueError where `layer` is not among `overlap.layers`.
    """
    if layer not in overlap.layers:
        raise ValueError(f"plot_attention: layer must be one of {overlap.layers}, got {layer}")
    first = max(len(tokens) - most, 0)
    shown = [_readable(token, 12) for token in tokens[first:]]
    width, place = max(0.27 * len(shown), 6), overlap.layers.index(layer)
    figure = Figure(figsize=(width + 4.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [width, 4]})
    style_axes(left, "Attention of the last token", "", "mean over heads", title_pad=19)
    places = np.arange(len(shown))
    rows = overlap.final_map[-1, first:].tolist(), overlap.maps[place, -1, first:].tolist()
    left.bar(places - 0.2, rows[0], 0.4, color=BLUE, label=overlap.final)
    left.bar(places + 0.2, rows[1], 0.4, color=ORANGE, label=f"layer {layer}")
    left.set_xticks(places, shown, rotation=60, ha="right", rotation_mode="anchor", fontsize=8,
                    fontfamily=_fonts())  # fmt: skip
    left.grid(False, axis="x")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8.5, frameon=False,
                borderaxespad=0.2, labelcolor=INK)  # fmt: skip
    mean = overlap.overlap.mean(1).tolist()
    style_axes(right, f"Overlap with the {overlap.final}", "layer", "mean over heads and queries")
    right.plot(overlap.layers, mean, color=BLUE, marker="o", markersize=3.5)
    right.plot([layer], [mean[place]], "D", color=ORANGE, markersize=8, label=f"layer {layer}")
    for name, means in (others or {}).items():
        right.plot(range(1, len(means) + 1), means, color=GREEN, marker="o", markersize=3.5,
                   label=name)  # fmt: skip
    right.set_ylim(0, 1.03)
    right.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    right.legend(fontsize=9, frameon=False, labelcolor=INK)
    return save_figure(figure, Path(path))


class _Cells(NamedTuple):
    text: list[str]
    probability: list[float]
    agrees: list[bool]


def _row(picture: Picture, layer: int) -> _Cells:
    final = layer == len(picture.top)
    agrees = [not final and same for same in picture.agrees[layer - 1]]
    return _Cells(picture.top[layer - 1], picture.probability[layer - 1], agrees)


def _grid_figure(
    rows: Sequence[_Cells], names: Sequence[str], tokens: Sequence[str], title: str
) -> Figure:
    width, height = len(tokens), len(rows)
    size = (max(_CELL * width, 3) + 2.2, 0.34 * height + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(
        [row.probability for row in rows], cmap=_SHADES, norm=Normalize(0, 1), aspect="auto"
    )
    for y, row in enumerate(rows):
        for x, (text, p, agrees) in enumerate(zip(*row, strict=True)):
            text = _readable(text, 8)
            size = 7.5 if len(text) < 7 else 6.2
            colour = "white" if p > 0.6 else INK
            ax.text(x, y, text, ha="center", va="center", fontsize=size, color=colour,
                    fontfamily=_fonts())  # fmt: skip
            if agrees:
                corner = (x - 0.46, y - 0.44)
                ax.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=_MARGIN, lw=1.3))
    ax.set_xticks(range(width), [_readable(t, 10) for t in tokens], rotation=50, ha="left",
                  rotation_mode="anchor", fontsize=8, color=INK, fontfamily=_fonts())  # fmt: skip
    ax.xaxis.tick_top()
    ax.set_xlabel(_CAPTION, fontsize=8.5, color=INK, loc="left")
    ax.xaxis.set_label_position("bottom")
    ax.set_yticks(range(height), names, fontsize=8.5, color=INK)
    ax.set_ylabel("layer", fontsize=10, color=INK)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks([x - 0.5 for x in range(width + 1)], minor=True)
    ax.set_yticks([y - 0.5 for y in range(height + 1)], minor=True)
    ax.grid(True, which="minor", color="white", linewidth=1.2)
    ax.tick_params(which="minor", length=0)
    figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=ax, fraction=0.025, pad=0.01)
    bar.set_label("probability of the top token", fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # pyright: ignore
    return figure


def visible_controls(token: str) -> str:
    """Line ends, tabs and other control characters, which no font can draw, spelled out."""
    token = token.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in token)


@lru_cache
def _fonts() -> list[str]:
    """Those of `_FONTS` that are installed."""
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


@lru_cache
def _has_glyph(character: str) -> bool:
    files = [fontManager.findfont(name) for name in _fonts()]
    return any(get_font(file).get_char_index(ord(character)) for file in files)


def _readable(token: str, most: int) -> str:
    """White space made visible, glyphs that no font has as code points, long tokens cut, no TeX."""
    shown = visible_controls(token)
    shown = "".join(c if _has_glyph(c) else f"U+{ord(c):04X}" for c in shown)
    if shown.strip(" ") == "":
        shown = "\u2423" * len(shown)
    shown = shown.strip(" ") or shown
    shown = shown if len(shown) <= most else shown[: most - 1] + "\u2026"
    return shown.replace("$", r"\$")
