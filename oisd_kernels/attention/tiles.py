"""How attention is cut into programs: tile sizes, and which tiles there are in a pack.

Nothing here waits for the device: the tables are made on it, and what the host needs to know, the
number of programs, is a bound.

Letters: N tokens, B sequences, P programs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from oisd_kernels.attention.spec import Geometry
from oisd_kernels.gpu import GFX942
from oisd_kernels.measured_tiles import measured


class Tile(NamedTuple):
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int
    split: bool = False  # plain gradients: blocks that need no mask in a loop of their own
    registers: int | None = None  # of a thread, at most
    depth: int | None = None  # of the products over K, if less: `attention_kernels.product`

    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# By architecture: (kernel, operands, largest head dimension). "align" has the teacher's scores
# beside the plain gradient; "alone", instead of it, "mixed" and "window" are there where they need
# another tile. Not tuned: the first without a spill in the cases of `audit_attention`. What has no
# tile is refused.
TILES: dict[int, dict[tuple[str, str, int], Tile]] = {
    80: {
        ("forward", "half", 64): Tile(128, 64, 8, 3),
        ("forward", "half", 128): Tile(128, 32, 8, 3),
        ("forward", "half", 256): Tile(64, 32, 8, 2, registers=255),
        ("forward", "fp32", 64): Tile(64, 32, 8, 2),
        ("forward", "fp32", 128): Tile(16, 32, 4, 2, registers=255),
        ("forward window", "half", 128): Tile(128, 32, 8, 2),
        ("statistics", "half", 64): Tile(128, 64, 8, 3),
        ("statistics", "half", 128): Tile(128, 64, 8, 3),
        ("statistics", "half", 256): Tile(64, 32, 8, 1, registers=255, depth=64),
        ("statistics", "fp32", 64): Tile(64, 32, 8, 2),
        ("statistics", "fp32", 128): Tile(64, 16, 4, 1, registers=255, depth=32),
        ("statistics of several", "half", 64): Tile(64, 64, 8, 1),
        ("statistics of several", "half", 128): Tile(64, 64, 8, 1),
        ("statistics of several", "half", 256): Tile(64, 32, 8, 1, registers=255, depth=64),
        ("statistics of several", "fp32", 64): Tile(64, 32, 8, 1, depth=32),
        ("statistics of several", "fp32", 128): Tile(64, 16, 4, 1, registers=255, depth=32),
        ("dq", "half", 64): Tile(128, 64, 8, 3, True),
        ("dq", "half", 128): Tile(128, 32, 8, 3, True),
        ("dq", "half", 256): Tile(32, 32, 8, 1),
        ("dq", "fp32", 64): Tile(32, 32, 8, 2),
        ("dq", "fp32", 128): Tile(16, 16, 4, 1),
        ("dq align", "half", 64): Tile(128, 32, 8, 2),
        ("dq align", "half", 128): Tile(64, 32, 8, 2),
        ("dq align", "half", 256): Tile(32, 32, 8, 1, depth=64),
        ("dq align", "fp32", 64): Tile(16, 32, 8, 1, registers=255),
        ("dq align", "fp32", 128): Tile(16, 16, 4, 1, registers=255, depth=32),
        ("dq alone", "half", 64): Tile(128, 64, 8, 2),
        ("dq alone", "half", 128): Tile(128, 32, 8, 2),
        ("dkdv", "half", 64): Tile(32, 64, 8, 2, True),
        ("dkdv", "half", 128): Tile(32, 64, 8, 2, True),
        ("dkdv", "half", 256): Tile(16, 32, 8, 1, registers=255),
        ("dkdv", "fp32", 64): Tile(32, 32, 8, 1),
        ("dkdv", "fp32", 128): Tile(16, 16, 8, 1),
        ("dkdv align", "half", 64): Tile(32, 64, 8, 1),
        ("dkdv align", "half", 128): Tile(32, 64, 8, 2, registers=255),
        ("dkdv align mixed", "half", 128): Tile(32, 32, 8, 2, registers=255),
        ("dkdv align", "half", 256): Tile(16, 32, 8, 1, depth=64),
        ("dkdv align", "fp32", 64): Tile(16, 32, 8, 1),
        ("dkdv align", "fp32", 128): Tile(16, 16, 4, 1, registers=255, depth=16),
        ("dkdv alone", "half", 64): Tile(32, 64, 8, 1, registers=255),
        ("sampled", "half", 128): Tile(16, 64, 4, 2, registers=168),
        ("sampled", "half", 256): Tile(16, 32, 4, 1, registers=168),
        ("sampled", "fp32", 64): Tile(16, 32, 4, 2, registers=168),
        ("sampled", "fp32", 128): Tile(16, 32, 4, 1),
        ("sampled dk", "half", 128): Tile(32, 16, 4, 1),
        ("sampled dk", "half", 256): Tile(16, 16, 4, 1),
        ("sampled dk", "fp32", 64): Tile(32, 16, 4, 1),
        ("sampled dk", "fp32", 128): Tile(32, 16, 4, 1),
    },
}
TILES[86] = TILES[80] | {  # 99 KB of shared memory
    ("forward", "half", 128): Tile(64, 32, 8, 2, registers=255),
    ("statistics", "half", 128): Tile(128, 64, 8, 2),
    ("dq align", "half", 256): Tile(32, 32, 8, 1, registers=255, depth=64),
    ("dq alone", "half", 128): Tile(64, 32, 8, 2),
    ("dkdv align", "half", 64): Tile(32, 32, 8, 2),
    ("dkdv alone", "half", 128): Tile(32, 32, 8, 2, registers=255),
}
TILES[90] = TILES[80] | {
    ("forward", "half", 128): Tile(128, 64, 8, 3),
    ("statistics of several", "half", 64): Tile(128, 64, 8, 1),
    ("dkdv align", "half", 128): Tile(16, 128, 8, 2),
    ("dkdv alone", "half", 128): Tile(32, 64, 8, 2),
    ("forward window", "half", 128): Tile(128, 64, 8, 3),
    ("dq", "half", 128): Tile(128, 64, 8, 3),
    ("dq align", "half", 64): Tile(128, 64, 8, 2),
    ("dq align", "half", 128): Tile(128, 64, 8, 2),
    ("dq alone", "half", 128): Tile(128, 64, 8, 2),
    ("dkdv", "half", 64): Tile(32, 128, 8, 3),
    ("dkdv", "half", 128): Tile(32, 128, 8, 2),
    ("dkdv window", "half", 128): Tile(32, 64, 8, 2, True),
    ("dkdv align", "half", 64): Tile(32, 128, 8, 3),
    ("dkdv alone", "half", 64): Tile(32, 128, 8, 3),
}
TILES[100] = TILES[90] | {
    ("dq", "half", 128): Tile(128, 64, 8, 3, True),
    ("dkdv", "half", 64): Tile(32, 128, 8, 1),
    ("dkdv", "half", 128): Tile(32, 128, 8, 1),
    ("dkdv window", "half", 128): Tile(32, 128, 8, 1),
    ("dkdv align", "half", 64): Tile(32, 128, 8, 1),
    ("dkdv alone", "half", 64): Tile(32, 128, 8, 1),
    ("dkdv align", "half", 128): Tile(32, 32, 8, 1, registers=255),
    ("dkdv alone", "half", 128): Tile(32, 32, 8, 1, registers=255),
}
# AMD's CDNA 3 has 64 KB, and its compiler knows no limit of registers.
TILES[GFX942] = {key: tile._replace(registers=None) for key, tile in TILES[86].items()} | {
    ("statistics", "fp32", 64): Tile(32, 32, 8, 2),
    ("dq", "half", 256): Tile(32, 32, 4, 1),
    ("dq align", "half", 128): Tile(64, 16, 8, 1),
    ("dq align", "half", 256): Tile(32, 32, 4, 1, depth=64),
    ("dkdv", "half", 128): Tile(32, 64, 8, 1, True),
    ("dkdv align", "half", 64): Tile(16, 64, 8, 1),
    ("dkdv align", "half", 128): Tile(16, 64, 8, 1),
    ("dkdv align mixed", "half", 128): Tile(16, 64, 8, 1),
    ("dkdv alone", "half", 128): Tile(16, 64, 8, 1),
}
INTERPRETED = Tile(16, 16, 4, 1)
SIZES = 64, 128, 256


def launch_tile(
    capability: int, kernel: str, dtype: torch.dtype, width: int, geometry: Geometry
) -> Tile:
    """The tile for a compute capability (90 for sm_90); 0 is the interpreter.

    kernel: "forward"; "statistics", " of several" behind it for several students; "dq" and "dkdv",
        the plain gradient, " align" behind them for the alignment beside it, " alone" for
        the alignment alone, and " mixed" for a teacher of another head dimension; over sampled keys
        "sampled" and "sampled dk".
    width: the largest head dimension, student's or teacher's.
    """
    if width > widest(capability, dtype, geometry.softcap):
        capped = "" if geometry.softcap is None else " with a softcap"
        raise ValueError(
            f"attention_triton: K must be at most {widest(capability, dtype, geometry.softcap)} in "
            f'{dtype}{capped} on sm_{capability}, got {width}; use impl="torch", or bfloat16'
        )
    if geometry.softcap is not None:
        width = min(2 * width, SIZES[-1])  # its registers are those of the next width's tile
    tiles = TILES[_known(capability)]
    names = [kernel, kernel.replace(" alone", " align")]
    names += [name.replace(" mixed", "") for name in names]
    if geometry.window is not None:
        names = [f"{name} window" for name in names] + names
    keys = [(name, _operands(dtype), size) for size in SIZES if width <= size for name in names]
    key = next((key for key in keys if key in tiles), keys[-1])  # the last: in the interpreter
    if (tile := measured("attention", key, capability)) is not None:
        return Tile(**tile)
    return INTERPRETED if capability == 0 else tiles[key]


def widest(capability: int, dtype: torch.dtype, softcap: float | None) -> int:
    """The largest head dimension that there is a tile for; 0: the dtype cannot run."""
    if capability == 0:
        return 256
    if dtype == torch.float64:
        return 0
    operands = _operands(dtype)
    largest = max(size for _, kind, size in TILES[_known(capability)] if kind == operands)
    return largest // 2 if operands == "fp32" and softcap is not None else largest


def _known(capability: int) -> int:
    """The architecture whose tiles serve; after sm_100 shared memory is that of sm_86 again."""
    if capability in TILES:
        return capability
    return 86 if capability >= 120 else max((c for c in TILES if c <= capability), default=86)


def _operands(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


class Tiles(NamedTuple):
    """Sequences cut into tiles, in their order."""

    table: Tensor  # [3, P] int32: begin and end of the sequence, first token; begin >= end: surplus
    sequence: Tensor  # [P]
    first: Tensor  # [B]: place of a sequence's first tile
    programs: int  # P

    @classmethod
    def of(cls, geometry: Geometry, tokens: int, block: int) -> "Tiles":
        offsets, B, longest = geometry.cu_seqlens.long(), geometry.sequences, geometry.max_length
        programs = tokens // block + min(B, tokens)
        if longest is not None:
            programs = min(programs, B * -(-longest // block))
        counts = (offsets.diff() + (block - 1)) // block
        ends = counts.cumsum(0)
        place = torch.arange(programs, device=offsets.device)
        sequence = torch.searchsorted(ends, place, right=True).clamp_max(B - 1)
        first = ends - counts
        begin = offsets[sequence]
        # Past the last tile it reaches the end of the last sequence, or goes beyond.
        start = begin + (place - first[sequence]) * block
        table = torch.stack((begin, offsets[sequence + 1], start)).int()
        return cls(table, sequence, first, programs)


def kept_before(weight: Tensor) -> Tensor:
    """[N + 1] int32: how many of the rows before this one have a weight [N] other than 0."""
    return pad((weight != 0).cumsum(0, dtype=torch.int32), (1, 0))


class Work(NamedTuple):
    """Which blocks of queries have a row of weight other than 0: see `attention_dkdv_kernel`."""

    first: Tensor  # [programs of the keys]
    rank: Tensor  # [blocks + 1]
    live: Tensor  # [blocks]
    kept: Tensor  # [N + 1]

    @classmethod
    def of(cls, geometry: Geometry, keys: Tiles, kept: Tensor, block: int) -> "Work":
        """keys: tiles of the keys; kept: of `kept_before`."""
        queries = Tiles.of(geometry, len(kept) - 1, block)
        _, end, start = queries.table.long()
        start = start.minimum(end)
        some = kept[(start + block).minimum(end)] > kept[start]
        rank = pad(some.cumsum(0, dtype=torch.int32), (1, 0))
        wanted = torch.arange(1, queries.programs + 1, device=rank.device, dtype=torch.int32)
        found = torch.searchsorted(rank, wanted).clamp_max(queries.programs) - 1
        live = queries.table[2][found]
        return cls(queries.first[keys.sequence].int(), rank, live, kept)
