"""docs/models.md from the rows of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oisd.jsonl import read_rows

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
Row = dict[str, Any]
MOVES = 1e-3  # the smallest relative change that is no rounding

_TEXT = """# Models

Which causal language models `Taps` reads, and so `oisd train`, `oisd lens` and the adapters. Every
decoder-only type that transformers registers is built tiny and random on a CPU, in float32, and
compared with what the model itself computes:

* **Lens**: the logits of a layer's hidden states against the model's own, where its last layer
  returns these hidden states; the captured states against `output_hidden_states`; gradients reach
  the layers at and below, and none above.
* **Attention**: softmax of the captured queries and keys against eager attention's
  `output_attentions`.
* The model's outputs under taps are unchanged.

"Both" has lens and attention, "lens" the lens alone (`attention_weight` of 0, or
`Taps(attention=False)`), "no" neither. *Error* is the largest relative difference of the lens and
of attention, in the newest version. *Padding* and *packing* tell whether a row that is padded on
the right, or follows another one with `position_ids` that restart, has the hidden states that it
has alone. Where they say no, this is the model's doing, with or without taps.

```bash
python -m benchmarks.models                # resumable; rows in benchmarks/results/models.jsonl
python -m benchmarks.models --write-docs   # this page
```

"""


def read(file: Path) -> list[Row]:
    """The latest row of each type and version."""
    rows: dict[tuple[str, str], Row] = {}
    for row in read_rows(file)[0]:
        rows[row["type"], row["transformers"]] = row
    return list(rows.values())


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def kind(row: Row | None) -> str:
    """ "both", "lens" or "no", "wrong" for a fault of ours; "" where there is no such type."""
    if row is None:
        return ""
    states = row.get("lens"), row.get("attention")
    if "not_built" in row:
        return "not built"
    if any(state in ("wrong", "broken") for state in states):
        return "wrong"
    if states == ("works", "works"):
        return "both"
    return "lens" if states[0] == "works" else "no"


def reason(row: Row) -> str:
    why = row.get("not_built") or row.get("lens_why") or row.get("attention_why") or ""
    why = why.removeprefix("Taps: ").replace("; use attention=False", "").replace("|", "\\|")
    return why.replace(f"{row.get('name')} is not understood: ", "").replace("<", "&lt;")


def _error(row: Row) -> str:
    lens, attention = row.get("lens_errors", {}), row.get("attention_errors", {})
    found = [lens.get("lens"), lens.get("logits"), attention.get("attention")]
    numbers = [number for number in found if number is not None]
    return f"{max(numbers):.0e}" if numbers else ""


def _keeps(row: Row, name: str) -> str:
    value = row.get("lens_errors", {}).get(name)
    return "" if value is None else "yes" if value < MOVES else "no"


def write(rows: Sequence[Row], to: Path = PAGE) -> None:
    versions = sorted({row["transformers"] for row in rows}, key=_version)
    by_type: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_type.setdefault(row["type"], {})[row["transformers"]] = row
    dates = sorted({row["date"] for row in rows if "date" in row})
    torches = sorted({row["torch"] for row in rows if "torch" in row})
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines = [f"Measured on {span} with torch {', '.join(torches)}.", ""]
    lines += ["| transformers | types | both | lens | no | wrong | not built |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for version in versions:
        kinds = [kind(found[version]) for found in by_type.values() if version in found]
        counts = [str(kinds.count(k)) for k in ("both", "lens", "no", "wrong", "not built")]
        lines.append(f"| {version} | {len(kinds)} | {' | '.join(counts)} |")
    lines += ["", f"| type | class | {' | '.join(versions)} | error | padding | packing | why |"]
    lines += [f"|---|---|{'---|' * len(versions)}---|---|---|---|"]
    for name in sorted(by_type):
        found = by_type[name]
        newest = found[max(found, key=_version)]
        cells = [f"`{name}`", newest.get("name", ""), *(kind(found.get(v)) for v in versions)]
        cells += [_error(newest), _keeps(newest, "padded"), _keeps(newest, "packed")]
        whys = [(v, reason(found[v])) for v in reversed(versions) if v in found]
        why = next((w if found[v] is newest else f"{v}: {w}" for v, w in whys if w), "")
        lines.append(f"| {' | '.join(cells)} | {why} |")
    to.write_text(_TEXT + "\n".join(lines) + "\n", encoding="utf-8")
