"""One HTML file with the lens and the attention of a text; it loads nothing from elsewhere.

The lens is a table, whose cells can be read, selected and searched. A token of the text, chosen,
shows what it attends to, in the layer and in the final one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from oisd import page
from oisd.lens import LensSummary, without_boundary
from oisd.lens.attention import AttentionOverlap
from oisd.lens.plots import Picture, visible_controls

_MOST_TOKENS = 400  # in the attention view; its maps grow with the square


def write_page(
    path: str | Path,
    title: str,
    summaries: Sequence[tuple[str, LensSummary]],
    pictures: Sequence[tuple[str, Picture]],
    attention: AttentionOverlap | None,
    tokens: Sequence[str],
    layer: int,
) -> Path:
    """Write the page and return its path.

    summaries, pictures: one for each model, by name.
    attention: of the first model on the text of `tokens`; None leaves the section out.
    layer: the student layer, counted from 1.
    """
    return page.write_page(
        Path(path),
        "lens.html",
        title=title,
        layer=layer,
        pictures=[
            {
                "name": name,
                "tokens": [visible(token) for token in picture.tokens],
                "rows": lens_rows(picture, range(len(picture.top), 0, -1), layer),
            }
            for name, picture in pictures
        ],
        summaries=[
            {
                "name": name,
                "tokens": summary.tokens,
                "boundary": boundary_words(summary),
                "rows": layer_rows(summary),
            }
            for name, summary in summaries
        ],
        attention=None if attention is None else _attention(attention, tokens, layer),
    )


def lens_rows(
    picture: Picture, layers: Iterable[int], marked: int, prefix: str = ""
) -> list[dict[str, Any]]:
    """Rows of the lens for `lens_rows` of layers.html: a name, and a cell for each token.

    layers: counted from 1, the top row first. marked: the layer with a mark. prefix: of each name.
    """
    rows, last = [], len(picture.top)
    for number in layers:
        name = "final" if number == last else str(number)
        cells = zip(
            map(visible, picture.top[number - 1]),
            picture.probability[number - 1],
            [same and number < last for same in picture.agrees[number - 1]],
            strict=True,
        )
        mark = " \u25c0" if number == marked else ""
        rows.append({"name": f"{prefix}{name}{mark}", "cells": list(cells)})
    return rows


def layer_rows(summary: LensSummary) -> list[tuple[int, tuple[float, ...]]]:
    """Rows for `layer_table` of layers.html, the final layer first."""
    layers = zip(*summary[:4], strict=True)  # divergence, entropy, entropy before, agreement
    rows = [
        (number, (divergence, before, after, same))
        for number, (divergence, after, before, same) in enumerate(layers, start=1)
    ]
    return rows[::-1]


def boundary_words(summary: LensSummary) -> str:
    """A sentence about the boundary layer."""
    if not summary.boundary_layer:
        return without_boundary(summary).capitalize() + "."
    return (
        f"Boundary layer, the last below the final one whose feed-forward block raises the "
        f"entropy: {summary.boundary_layer}."
    )


def _attention(overlap: AttentionOverlap, tokens: Sequence[str], layer: int) -> dict[str, Any]:
    layer = overlap.nearest(layer)
    place = overlap.layers.index(layer)
    shown = min(len(tokens), _MOST_TOKENS)
    maps = {
        "final": overlap.final_map[:shown, :shown],
        "layer": overlap.maps[place, :shown, :shown],
    }
    data = {
        name: [
            [round(share, 4) for share in row[: query + 1]]
            for query, row in enumerate(values.tolist())
        ]
        for name, values in maps.items()
    }
    data["overlap"] = [round(x, 4) for x in overlap.overlap[place, :shown].tolist()]
    return {"final": overlap.final, "layer": layer, "tokens": tokens[:shown], "data": data}


def visible(token: str) -> str:
    """White space and control characters made visible: a cell must not look empty."""
    token = visible_controls(token)
    return "\u2423" * len(token) if token.strip(" ") == "" else token
