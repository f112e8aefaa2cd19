"""A small sweep of tiles: which compute right and fit, which is faster, and the file of the best.

First every candidate is compiled and held against float64, beside other steps; then those that
passed are timed in turns with today's tile. A tile is kept in `tiles.json` if the slowest fifth of
its rounds is still faster than the fastest fifth of today's. Copied to
`oisd_kernels/measured_tiles.json`, the file is what `oisd_kernels.measured_tiles` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.cases.attention import inputs as attention_inputs
from benchmarks.cases.lens import Shape
from benchmarks.cases.lens import inputs as lens_inputs
from benchmarks.cases.shapes import ATTENTIONS, HEADS
from benchmarks.gpu import attention_checks, lens_checks, results
from benchmarks.gpu.place import Place
from benchmarks.gpu.worker import Outcome, Work
from benchmarks.measure import timer
from benchmarks.measure.machine import device_name
from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention
from oisd_kernels import logit_lens_divergence as lens_op
from oisd_kernels.attention import tiles as attention_tiles
from oisd_kernels.lens.tiled import tiles as lens_tiles
from oisd_kernels.measured_tiles import FIELDS, Key, trying

NAME = "tiles.json"
Tile = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """An entry of a launch table and what is tried in its place."""

    family: str
    key: Key
    work: str
    """Of `_timed`: what is timed with it."""
    others: tuple[tuple[Any, ...], ...]
    """In the order of the family's fields; the rest are the record's defaults."""

    @property
    def name(self) -> str:
        return f"{self.family} {' '.join(map(str, self.key))}"

    def candidates(self, place: Place) -> Iterator[tuple[str, Tile]]:
        """Today's first. In the interpreter, small ones."""
        record = attention_tiles.Tile if self.family == "attention" else lens_tiles.Tile
        table: Any = attention_tiles.TILES if self.family == "attention" else lens_tiles.TILES
        if place.rehearsal:
            small = (16, 32, 4, 1) if self.family == "attention" else (16, 16, 16, 4, 1)
            tiles = [attention_tiles.INTERPRETED, record(*small)]
            if self.family == "lens":
                tiles[0] = lens_tiles.INTERPRETED
        else:
            tiles = [table[90][self.key], *(record(*other) for other in self.others)]
        for tile in tiles:
            fields = {name: getattr(tile, name) for name in FIELDS[self.family]}
            label = "x".join(map(str, tile[: 3 if self.family == "lens" else 2]))
            label += f", {tile.warps} warps, {tile.stages} stages"
            yield (label if tile.registers is None else f"{label}, {tile.registers} r"), fields


# For sm_90 at K = 128 in half precision, which the paper's models have. `benchmarks.gpu.candidates`
# compiles them: none may spill.
ENTRIES = [
    Entry("attention", ("dkdv align", "half", 128), "fused",
          ((32, 32, 8, 2, False, 255), (32, 32, 8, 3, False, 255), (16, 64, 8, 2))),
    Entry("attention", ("dq align", "half", 128), "fused",
          ((128, 32, 8, 2), (64, 32, 8, 3), (128, 32, 8, 3))),
    Entry("attention", ("statistics", "half", 128), "divergence",
          ((128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3))),
    Entry("attention", ("dkdv", "half", 128), "plain",
          ((32, 128, 8, 3), (32, 64, 8, 2, True), (16, 128, 8, 2, True))),
    Entry("attention", ("dq", "half", 128), "plain",
          ((128, 64, 8, 2), (64, 64, 8, 3), (64, 128, 8, 2))),
    Entry("attention", ("forward", "half", 128), "forward",
          ((128, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2))),
    # The JSD's kernel, whose row values count as "more".
    Entry("lens", (2, "more"), "lens",
          ((64, 128, 64, 8, 4), (128, 64, 64, 8, 5), (128, 64, 64, 8, 3))),
]  # fmt: skip


def chosen(place: Place) -> list[Entry]:
    """A rehearsal takes one of each family."""
    return [ENTRIES[0], ENTRIES[-1]] if place.rehearsal else ENTRIES


def _check(place: Place, entry: Entry, tile: Tile) -> Outcome:
    with trying(entry.family, entry.key if not place.rehearsal else _interpreted(entry), tile):
        if entry.family == "lens":
            return _lens_values(place)
        if entry.work == "divergence":
            return attention_checks.divergence(place, "triton")
        divergence = "jsd" if entry.work == "fused" else None
        return attention_checks.flash(place, "triton", divergence=divergence)


def _lens_values(place: Place) -> Outcome:
    """Without a gradient, whose launches take another entry."""
    given = lens_checks.tensors(place, 1, "saturated", place.dtype)
    tensors = [given[name] for name in ("hidden", "final", "weight")]
    loss = lens_op(*tensors, impl="tiled")
    truth = lens_op(*(x.double() for x in tensors), impl="reference")
    return Outcome({"loss": loss}, {"loss": truth}, lens_checks.BOUNDS[place.dtype])


def _interpreted(entry: Entry) -> Key:
    """The key that a rehearsal's dtype and head dimension lead to."""
    if entry.family == "lens":
        return entry.key[0], "fp32"
    return entry.key[0], "fp32", 64


def check(work: Work) -> None:
    """Every candidate against float64, each a check; what does not fit on the GPU fails."""
    for entry in chosen(work.place):
        for label, tile in entry.candidates(work.place):
            name = f"{entry.name}: {label}"
            work.check(name, partial(_candidate, work.place, entry, tile))


def _candidate(place: Place, entry: Entry, tile: Tile) -> Outcome | str:
    """A tile that the GPU refuses is no fault: it is told, and not timed."""
    try:
        return _check(place, entry, tile)
    except triton.runtime.errors.OutOfResources as error:
        return f"{REFUSED}: {str(error).splitlines()[0]}"


REFUSED = "does not fit"


def time(work: Work) -> None:
    """The passed candidates of each entry in turns; the file of the best after each entry."""
    place = work.place
    rows = [row for row in work.results.rows("check") if row["verdict"] == results.PASSED]
    passed = {row["name"] for row in rows if not str(row.get("reason", "")).startswith(REFUSED)}
    best: list[dict[str, Any]] = [row["best"] for row in work.results.rows("tile") if row["best"]]
    for entry in chosen(place):
        tiles = {label: tile for label, tile in entry.candidates(place)
                 if f"{entry.name}: {label}" in passed}  # fmt: skip
        if not work.begin(entry.name):
            continue
        run = _timed(place, entry.work)
        functions = {label: partial(_with, place, entry, tile, run)
                     for label, tile in tiles.items()}  # fmt: skip
        plan = timer.Plan(warmup=2, rounds=place.rounds, seconds=4.0)
        found = timer.interleaved(functions, plan, place.device)
        spreads = {label: timer.spread(seconds) for label, seconds in found.items()}
        kept = _best(entry, tiles, spreads, next(entry.candidates(place))[0])
        medians = {label: spread[0] for label, spread in spreads.items()}
        verdict = results.PASSED if spreads else results.FAILED
        reason = f"{kept['label']} instead of today's" if kept else "today's stays"
        work.append("tile", entry.name, verdict, best=kept, seconds=medians, reason=reason)
        work.append("check", entry.name, verdict, reason=reason)
        if kept:
            best.append(kept)
        write(Path(work.task.folder), place, best)


def _best(
    entry: Entry, tiles: dict[str, Tile], spreads: dict[str, tuple[float, float, float]], today: str
) -> dict[str, Any] | None:
    """The fastest tile, if it is beyond doubt faster than today's."""
    if today not in spreads:
        return None
    label = min(spreads, key=lambda one: spreads[one][0])
    _, today_low, _ = spreads[today]
    if label == today or spreads[label][2] >= today_low:
        return None
    ratio = spreads[label][0] / spreads[today][0]
    return {"family": entry.family, "key": list(entry.key), "tile": tiles[label],
            "label": label, "of_today": round(ratio, 3)}  # fmt: skip


def write(folder: Path, place: Place, best: Sequence[dict[str, Any]]) -> None:
    """The file that `oisd_kernels.measured_tiles` reads; a rehearsal's is of no GPU."""
    device = "rehearsal" if place.rehearsal else device_name(place.device)
    content = {"device": device, "triton": triton.__version__, "tiles": list(best)}
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _with(place: Place, entry: Entry, tile: Tile, run: Callable[[], object]) -> object:
    with trying(entry.family, _interpreted(entry) if place.rehearsal else entry.key, tile):
        return run()


def _timed(place: Place, kind: str) -> Callable[[], object]:
    """What an entry is timed by: the shortest call of ours in which its kernel counts."""
    if kind == "lens":
        return _lens(place)
    shape, tokens = (place.attention, 16) if place.rehearsal else (ATTENTIONS["qwen3-4b"], 8192)
    plain = attention_inputs(shape, tokens, place.device, place.dtype, values=True)
    teacher = attention_inputs(shape, tokens, place.device, place.dtype)
    q, k, v = (plain[name] for name in "qkv")
    qt, kt, weights = teacher["q_teacher"], teacher["k_teacher"], plain["weights"]
    if kind == "divergence":
        lse = flash_attention(q, k, v, impl="triton")[1].detach()
        lse_t = flash_attention(qt, kt, kt, impl="triton")[1].detach()
        given = {"token_weight": weights, "lse": lse, "lse_teacher": lse_t, "impl": "triton"}
        return torch.no_grad()(lambda: attention_divergence(q, k, qt, kt, **given))
    if kind == "forward":
        return torch.no_grad()(lambda: flash_attention(q, k, v, impl="triton"))
    alignment = AttentionAlignment() if kind == "fused" else None
    out, _ = flash_attention(q, k, v, alignment=alignment, impl="triton")
    ends, upstream = [out], [plain["d_out"]]
    if alignment is not None:
        rows = alignment.loss(qt, kt, token_weight=weights)
        ends, upstream = [*ends, rows.sum()], [*upstream, rows.new_ones(())]
    return lambda: torch.autograd.grad(ends, (q, k, v), upstream, retain_graph=True)


def _lens(place: Place) -> Callable[[], Tensor]:
    head, tokens = (place.head, place.tokens) if place.rehearsal else (HEADS["qwen3-4b"], 2048)
    given = lens_inputs(Shape(head, "sweep", 1, tokens, gradient=False), place.device, place.dtype)
    tensors = [given[name] for name in ("hidden", "final", "weight")]
    return torch.no_grad()(lambda: lens_op(*tensors, impl="tiled"))
