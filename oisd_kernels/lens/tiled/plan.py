"""How much of dZ the backward of the tiled losses holds at once, from its workspace.

The workspace holds `row` bytes for each row of a slab, `column` bytes for each tile of a slice, and
`cell` bytes for each row in a tile. It is bounded whatever the numbers of tokens and of the
vocabulary: they set how often a slab or a slice is taken, not how large it is.
"""

from typing import NamedTuple

from oisd_kernels import checks
from oisd_kernels.lens.tiled.tiles import WORKSPACE, Tile

TILES_OF_A_SLICE = 60  # bits of an int64 say which are live
ROWS_OF_A_SLAB = 2048  # more of them read W less often, and it is not W that limits then


class Plan(NamedTuple):
    tokens: int  # of a slab
    tiles: int  # of a slice
    bytes: int  # workspace that both take


def plan_slabs(
    op: str, layers: int, tokens: int, vocabulary: int, tile: Tile, row: int, cell: int,
    budget: int | None,
) -> Plan:  # fmt: skip
    """Slabs outside, slices inside. `row`: bytes of a row; `cell`: of a row in a tile."""
    budget, most = _budget(op, layers * (row + cell), budget), _most_tiles(vocabulary, tile)
    rows = min(budget // 2 // row, ROWS_OF_A_SLAB, budget // (row + cell))
    slab = _whole_blocks(max(rows // layers, 1), layers, tile)
    rows = min(slab, max(tokens, 1)) * layers
    tiles = min((budget - rows * row) // (rows * cell), most)
    return Plan(rows // layers, tiles, rows * row + rows * tiles * cell)


def plan_slices(
    op: str, layers: int, tokens: int, vocabulary: int, tile: Tile, row: int, cell: int,
    column: int, budget: int | None,
) -> Plan:  # fmt: skip
    """Slices outside, slabs inside. `column`: bytes of a tile's accumulator besides."""
    needed, most = layers * (row + cell) + column, _most_tiles(vocabulary, tile)
    budget = _budget(op, needed, budget)
    tiles = max(min(budget // 2 // column, most), 1)
    rows = (budget - tiles * column) // (row + tiles * cell)
    if rows < layers:
        tiles = 1
        rows = (budget - column) // (row + cell)
    rows = min(rows, 4 * ROWS_OF_A_SLAB)
    slab = _whole_blocks(max(rows // layers, 1), layers, tile)
    rows = min(slab, max(tokens, 1)) * layers
    return Plan(rows // layers, tiles, rows * row + tiles * column + rows * tiles * cell)


def _budget(op: str, needed: int, budget: int | None) -> int:
    budget = WORKSPACE if budget is None else budget
    if budget < needed:
        wanted = f'be at least {needed} for a gradient with impl="tiled"'
        remedy = "one token against one tile of the vocabulary takes so much"
        raise checks.argument_error(op, "max_bytes", wanted, budget, remedy)
    return budget


def _most_tiles(vocabulary: int, tile: Tile) -> int:
    return min(-(-vocabulary // tile.v), TILES_OF_A_SLICE)


def _whole_blocks(tokens: int, layers: int, tile: Tile) -> int:
    """Fewer tokens, if that saves a block of rows that is mostly empty."""
    blocks = tokens * layers // tile.n
    return tokens if blocks == 0 else max(blocks * tile.n // layers, 1)
