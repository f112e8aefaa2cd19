"""How many rows are in memory at once, and which.

A chunk is a run of kept tokens with the kept student rows that belong to them. Its logits fill one
buffer: the tokens' final-layer rows first, the student rows after them.

Letters: S student layers, N tokens, D width, V vocabulary, R kept student rows.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks

# Default workspace. On CUDA it holds 1,024 tokens beside one layer at a vocabulary of 151,936,
# where the matmuls have reached their speed; on a CPU they reach it with far fewer rows.
DEFAULT_BYTES = {"cuda": 5 << 28, "cpu": 3 << 25}
# Entries that the torch row functions work on at once. On a CPU: as many as outweigh a call and let
# the scratch stay in its last cache, but fewer, down to TILE, where there are few rows. Elsewhere:
# as many as outweigh a launch.
TILE, WIDE_TILE, DEVICE_TILE = 1 << 16, 1 << 18, 1 << 22
SHARE = 16  # rows for each one of a tile wider than TILE, so that its scratch stays a third of them
SCRATCH_ROWS = 5  # of theirs for one row of the tile
ALIGNMENT = 64  # logits of a row start at a multiple of so many entries


class Chunk(NamedTuple):
    tokens: slice  # among the kept tokens
    rows: slice  # among the kept student rows


class Plan(NamedTuple):
    token_index: Tensor | None  # [kept tokens], into N; None where all N are kept
    layer_of_row: Tensor  # [R], into S
    token_of_row: Tensor  # [R], into N
    slot_of_row: Tensor  # [R], into the kept tokens
    chunks: list[Chunk]


def tile_rows(device: torch.device, vocabulary: int, rows: int) -> int:
    """How many the torch row functions take at once, of so many rows or more."""
    least, most = _tile_bounds(device, vocabulary)
    return min(max(rows // SHARE, least), most)


def _tile_bounds(device: torch.device, vocabulary: int) -> tuple[int, int]:
    entries = (TILE, WIDE_TILE) if device.type == "cpu" else (DEVICE_TILE, DEVICE_TILE)
    return max(entries[0] // max(vocabulary, 1), 1), max(entries[1] // max(vocabulary, 1), 1)


def padded(vocabulary: int) -> int:
    return -(-vocabulary // ALIGNMENT) * ALIGNMENT


def row_capacity(
    op: str,
    max_bytes: int | None,
    device: torch.device,
    vocabulary: int,
    width: int,
    itemsize: int,
    least: int,
    parallel: bool = False,
) -> int:
    """Rows of logits that the budget holds, of which an op needs at least `least`.

    A row costs its logits and, in fp32 or float64, its hidden state before and after; the torch row
    functions, which a vocabulary in parts takes everywhere, need scratch besides.
    """
    row = (padded(vocabulary) + 2 * width) * itemsize
    scratch, tile, widest = 0, 0, 0
    if device.type != "cuda" or parallel:
        scratch = SCRATCH_ROWS * vocabulary * itemsize
        tile, widest = _tile_bounds(device, vocabulary)
    if max_bytes is None:
        budget = DEFAULT_BYTES.get(device.type, DEFAULT_BYTES["cuda"])
    else:
        budget = max_bytes
    rows = budget // (row + scratch)
    if rows > tile:  # the scratch grows no further,
        rows = (budget - tile * scratch) // row
    if rows // SHARE > tile:  # or with a share of the rows, up to the widest tile
        shared = SHARE * budget // (SHARE * row + scratch)
        rows = max(SHARE * tile, shared, (budget - widest * scratch) // row)
    if rows >= least or max_bytes is None:
        return max(rows, least)
    needed = least * row + min(least, tile) * scratch
    wanted = f"be at least {needed} (the workspace of one token)"
    remedy = "raise it, or leave it None for the default"
    raise checks.argument_error(op, "max_bytes", wanted, max_bytes, remedy)


def plan(
    layers: int,
    tokens: int,
    factor: Tensor | None,
    every_token: bool,
    capacity: int,
    device: torch.device,
) -> Plan:
    """Chunks of at most `capacity` rows over the rows whose `factor` [S, N] is not 0.

    `every_token` keeps a token without student rows. With `factor` None all rows are kept, and the
    host need not wait for the device; otherwise it does so once, to count the rows of each token.
    The indices are on `device`, that of the hidden states and of `factor`.
    """
    if factor is None:
        ends = torch.arange(1, tokens + 1) * (layers + 1)
        rows_end = torch.arange(1, tokens + 1) * layers
        row = torch.arange(layers * tokens, device=device)
        token_of_row = row // max(layers, 1)
        return Plan(
            None, row % max(layers, 1), token_of_row, token_of_row, _split(ends, rows_end, capacity)
        )
    keep = factor != 0
    token_keep = torch.ones_like(keep[0]) if every_token else keep.any(0)
    # Both numbers travel in one copy: the one time that the host waits.
    count, token_count = torch.stack([keep.sum(0), token_keep.long()]).cpu()
    kept_rows = count[token_count != 0]
    rows_end = kept_rows.cumsum(0)
    ends = (kept_rows + 1).cumsum(0)
    kept, total = len(kept_rows), int(count.sum())
    # A stable sort instead of nonzero, which would make the host wait again.
    row = (~keep.t().reshape(-1)).to(torch.uint8).argsort(stable=True)[:total]
    token_of_row = row // max(layers, 1)
    slot = token_keep.cumsum(0) - 1
    token_index = (~token_keep).to(torch.uint8).argsort(stable=True)[:kept]
    return Plan(
        None if kept == tokens else token_index,
        row % max(layers, 1),
        token_of_row,
        slot[token_of_row],
        _split(ends, rows_end, capacity),
    )


def _split(ends: Tensor, rows_end: Tensor, capacity: int) -> list[Chunk]:
    """Runs of tokens; `ends` counts rows of both kinds up to and with each token.

    As few chunks as greedy runs make, of even sizes: the rest would be a slow matmul of few rows.
    """
    chunks = _runs_of(ends, rows_end, capacity)
    if len(chunks) < 2:
        return chunks
    largest = int(ends.diff(prepend=ends.new_zeros(1)).max())
    share = -(-int(ends[-1]) // len(chunks))
    return _runs_of(ends, rows_end, min(share + largest - 1, capacity))


def _runs_of(ends: Tensor, rows_end: Tensor, capacity: int) -> list[Chunk]:
    """Greedy runs."""
    chunks, start, used, row = [], 0, 0, 0
    while start < len(ends):
        stop = int(torch.searchsorted(ends, used + capacity, right=True))
        stop = max(stop, start + 1)  # one token may have more rows than fit: see `runs`
        row_stop = int(rows_end[stop - 1])
        chunks.append(Chunk(slice(start, stop), slice(row, row_stop)))
        start, used, row = stop, int(ends[stop - 1]), row_stop
    return chunks


def runs(rows: slice, longest: int) -> Iterator[slice]:
    """The slice in pieces of at most `longest`."""
    edges = [*range(rows.start, rows.stop, max(longest, 1)), rows.stop]
    return (slice(a, b) for a, b in itertools.pairwise(edges))
