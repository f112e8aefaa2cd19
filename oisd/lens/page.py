"""One HTML file with the lens and the attention of a text; it loads nothing from elsewhere.

The lens is a table, whose cells can be read, selected and searched. A click on a token of the text
shows what it attends to, in the layer and in the final one.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from oisd.lens import LensSummary, without_boundary
from oisd.lens.attention import AttentionOverlap
from oisd.lens.plots import Picture, visible_controls

_MOST_TOKENS = 400  # in the attention view; its maps grow with the square

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #ffffff; --soft: #66727f;
  --line: #dfe4ea; --blue: 0, 114, 178; --orange: 213, 94, 0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --paper: #14191f; --soft: #98a4b1; --line: #2d3640;
    --blue: 86, 180, 233; --orange: 230, 159, 0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 76rem; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p { max-width: 46rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-size: 12px; }
th { font-weight: 500; color: var(--soft); text-align: right; padding: 2px 6px;
  white-space: pre; }
thead th { text-align: center; }
td { text-align: center; padding: 3px 6px; border-radius: 3px; white-space: pre;
  min-width: 2.6rem; border: 1.5px solid transparent; }
td.same { border-color: var(--ink); }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers tr.chosen td, .numbers tr.chosen th { font-weight: 700; color: var(--ink); }
.text { font: 14px/2.1 ui-monospace, monospace; border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .9rem; white-space: pre-wrap; }
.text span { border-radius: 3px; padding: 2px 0; cursor: pointer; }
.text span.query { outline: 2px solid var(--ink); }
.name { font-size: 13px; font-weight: 600; margin: 1rem 0 .3rem; }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("attention").textContent);
function show(query) {
  for (const [id, colour] of [["final", "--blue"], ["layer", "--orange"]]) {
    const row = data[id][query], largest = Math.max(...row, 1e-9);
    document.querySelectorAll("#" + id + " span").forEach((span, key) => {
      const share = key <= query ? row[key] : 0;
      span.style.background = `rgba(var(${colour}), ${0.85 * share / largest})`;
      span.title = key <= query ? (100 * share).toFixed(1) + " % of the attention" : "";
      span.classList.toggle("query", key === query);
    });
  }
  document.getElementById("overlap").textContent = data.overlap[query].toFixed(3);
}
document.querySelectorAll(".text span").forEach(span =>
  span.addEventListener("click", () => show(Number(span.dataset.place))));
show(data.overlap.length - 1);
"""


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
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [_lens_section(name, picture, layer) for name, picture in pictures]
    parts += [_layers_section(name, summary, layer) for name, summary in summaries]
    if attention is not None:
        parts.append(_attention_section(attention, tokens, layer))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _lens_section(name: str, picture: Picture, layer: int) -> str:
    head = "".join(f"<th>{_visible(token)}</th>" for token in picture.tokens)
    rows, last = [], len(picture.top)
    layers = zip(picture.top, picture.probability, picture.agrees, strict=True)
    for number, row in reversed(list(enumerate(layers, start=1))):
        cells = []
        for text, p, same in zip(*row, strict=True):
            outline = ' class="same"' if same and number < last else ""
            ink = "#fff" if p > 0.6 else "inherit"
            cells.append(
                f'<td{outline} style="background:rgba(var(--blue),{p:.3f});color:{ink}" '
                f'title="layer {number}: {100 * p:.2f} %">{_visible(text)}</td>'
            )
        label = "final" if number == last else str(number)
        label = f"{label} \u25c0" if number == layer else label
        rows.append(f"<tr><th>{label}</th>{''.join(cells)}</tr>")
    return (
        f"<h2>What each layer would say next: {html.escape(name)}</h2>"
        "<p>Above each column is the token read; each cell holds the token that the layer, "
        "through the final norm and the unembedding, predicts to come next. The darker, the "
        "likelier; outlined where it is the final layer's. "
        f"\u25c0 marks layer {layer}.</p>"
        f'<div class="scroll"><table><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _layers_section(name: str, summary: LensSummary, layer: int) -> str:
    rows = []
    layers = zip(*summary[:4], strict=True)  # divergence, entropy, entropy before, agreement
    for number, (divergence, after, before, same) in reversed(list(enumerate(layers, start=1))):
        chosen = ' class="chosen"' if number == layer else ""
        values = (divergence, before, after, same)
        cells = "".join(
            "<td>\u2013</td>" if math.isnan(value) else f"<td>{value:.4f}</td>" for value in values
        )
        rows.append(f"<tr{chosen}><th>{number}</th>{cells}</tr>")
    boundary = (
        f"Boundary layer, the last below the final one whose feed-forward block raises the "
        f"entropy: {summary.boundary_layer}."
        if summary.boundary_layer
        else without_boundary(summary).capitalize() + "."
    )
    return (
        f"<h2>Layer by layer: {html.escape(name)}</h2>"
        f"<p>Means over {summary.tokens} tokens, in nats. {boundary}</p>"
        '<div class="scroll"><table class="numbers"><thead><tr><th>layer</th>'
        "<th>divergence</th><th>entropy before feed-forward</th><th>entropy</th>"
        f"<th>same top token</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _attention_section(attention: AttentionOverlap, tokens: Sequence[str], layer: int) -> str:
    layer = attention.nearest(layer)
    place = attention.layers.index(layer)
    shown = min(len(tokens), _MOST_TOKENS)
    maps = {
        "final": attention.final_map[:shown, :shown],
        "layer": attention.maps[place, :shown, :shown],
    }
    data = {
        name: [
            [round(share, 4) for share in row[: query + 1]]
            for query, row in enumerate(values.tolist())
        ]
        for name, values in maps.items()
    }
    data["overlap"] = [round(x, 4) for x in attention.overlap[place, :shown].tolist()]
    spans = "".join(
        f'<span data-place="{i}">{html.escape(token)}</span>'
        for i, token in enumerate(tokens[:shown])
    )
    # Within a script element only "</" could end it.
    payload = json.dumps(data).replace("</", "<\\/")
    return (
        "<h2>Where the layers look</h2>"
        "<p>Click a token: the shade of the tokens before it is the attention that it pays them, "
        f"mean over the heads. Overlap with the {attention.final} at this token, 1 where head by "
        'head all is equal: <b id="overlap"></b></p>'
        f'<div class="name">{attention.final}</div><div class="text" id="final">{spans}</div>'
        f'<div class="name">layer {layer}</div><div class="text" id="layer">{spans}</div>'
        f'<script type="application/json" id="attention">{payload}</script>'
        f"<script>{_SCRIPT}</script>"
    )


def _visible(token: str) -> str:
    """White space and control characters made visible: a cell must not look empty."""
    token = visible_controls(token)
    return html.escape("\u2423" * len(token) if token.strip(" ") == "" else token)
