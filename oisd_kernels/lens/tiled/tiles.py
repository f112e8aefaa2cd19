"""What the launches of the tiled kernels share: tiles by architecture, operands, rows of work.

Letters: S student layers, N tokens, T of them in a slab, R = S*T rows, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from oisd_kernels.gpu import GFX942, is_aligned, machine, table_key, unit_stride
from oisd_kernels.lens.tiled.kernels import tiled_jsd_kernel
from oisd_kernels.measured_tiles import measured

WORKSPACE = 32 << 20
ROW_BYTES = 192  # of a row once: order of work, sort, statistics, combined values in float64

# The interpreter has to be chosen before Triton is imported.
INTERPRETED_KERNELS = type(tiled_jsd_kernel).__name__ == "InterpretedFunction"


class Tile(NamedTuple):
    n: int  # rows
    v: int  # tokens of the vocabulary
    d: int  # width
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most, for NVIDIA

    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# By architecture, number of accumulators, and operands: "half", where "more" has bias, softcap,
# statistics or a gradient to hold; "fp32"; "odd" where an address or a stride is no multiple of 16
# and loads cannot be vectorised. Without spills, not tuned. With a limit of 255 registers, which is
# the hardware's, ptxas does not spill a few to fit another block.
TILES = {
    80: {
        (1, "half"): Tile(128, 128, 64, 8, 3),
        (1, "more"): Tile(128, 128, 64, 8, 3),
        (1, "fp32"): Tile(64, 32, 32, 8, 3),
        (1, "odd"): Tile(64, 32, 16, 8, 2),
        (2, "half"): Tile(64, 128, 64, 8, 3),
        (2, "more"): Tile(128, 64, 64, 8, 3),
        (2, "fp32"): Tile(64, 32, 32, 8, 3),
        (2, "odd"): Tile(32, 32, 16, 4, 2),
    },
    90: {
        (1, "half"): Tile(128, 256, 64, 8, 4),
        (1, "more"): Tile(128, 128, 64, 8, 4),
        (1, "fp32"): Tile(64, 128, 32, 8, 3),
        (1, "odd"): Tile(64, 64, 16, 8, 2),
        (2, "half"): Tile(128, 128, 64, 8, 4),
        (2, "more"): Tile(128, 64, 64, 8, 4),
        (2, "fp32"): Tile(64, 64, 32, 8, 3),
        (2, "odd"): Tile(64, 64, 16, 8, 2),
    },
    GFX942: {
        (1, "half"): Tile(128, 128, 64, 8, 2),
        (1, "more"): Tile(128, 128, 64, 8, 2),
        (1, "fp32"): Tile(64, 64, 32, 8, 2),
        (1, "odd"): Tile(64, 64, 16, 8, 2),
        (2, "half"): Tile(128, 64, 64, 8, 2),
        (2, "more"): Tile(128, 64, 64, 8, 2),
        (2, "fp32"): Tile(64, 64, 32, 8, 2),
        (2, "odd"): Tile(64, 64, 16, 8, 2),
    },
}
TILES[86] = TILES[80] | {(2, "more"): Tile(128, 64, 32, 8, 3)}  # 99 KB of shared memory
TILES[100] = TILES[90] | {
    (1, "more"): Tile(128, 64, 64, 8, 4, 255),
    (1, "fp32"): Tile(64, 32, 32, 4, 3),
    (1, "odd"): Tile(64, 32, 16, 4, 2),
    (2, "half"): Tile(128, 64, 64, 8, 4),
    (2, "more"): Tile(128, 64, 64, 8, 4, 255),
    (2, "fp32"): Tile(64, 64, 32, 8, 2, 255),
    (2, "odd"): Tile(64, 32, 16, 4, 2),
}
INTERPRETED = Tile(16, 32, 16, 4, 1)


def operand_kind(operand: torch.dtype, aligned: bool, plain: bool) -> str:
    if not aligned:
        return "odd"
    return "fp32" if operand == torch.float32 else "half" if plain else "more"


def launch_tile(
    capability: int, accumulators: int, operand: torch.dtype, aligned: bool, plain: bool
) -> Tile:
    """The tile for a compute capability; 0 is the interpreter."""
    key = accumulators, operand_kind(operand, aligned, plain)
    if (tile := measured("lens", key, capability)) is not None:
        return Tile(**tile)
    return INTERPRETED if capability == 0 else TILES[table_key(capability, TILES)][key]


class Head:
    """The unembedding and the states against it, as the kernels take them."""

    def __init__(
        self,
        states: list[Tensor],  # [S, N, D] or [1, N, D] each
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        compute: torch.dtype,
        capability: int | None = None,
    ):
        self.states = [unit_stride(x.detach()) for x in states]
        self.weight = unit_stride(weight.detach())
        self.bias = None if bias is None else bias.detach().contiguous()
        self.compute = compute
        self.aligned = all(is_aligned(x) for x in (*self.states, self.weight))
        self.programs = 264
        if capability is None:
            capability, self.programs = machine(weight.device)
        self.capability = capability
        dtypes = {x.dtype for x in (*states, weight)}
        half = dtypes in ({torch.float16}, {torch.bfloat16})
        # The interpreter's tl.dot takes the bits of bf16 for integers.
        self.operand = weight.dtype if half and capability > 0 else compute

    def precision(self, operand: torch.dtype) -> str | None:
        """How `tl.dot` multiplies operands of this dtype."""
        if operand != torch.float32:
            return None
        return "ieee" if self.capability == GFX942 else "tf32x3"


class Scores(NamedTuple):
    """What lies between the projection and the softmax."""

    temperature: float
    softcap: float | None

    def scalars(self) -> tuple[float, float, float]:
        cap = 1.0 if self.softcap is None else self.softcap
        return cap, 1 / cap, 1 / self.temperature


class Work(NamedTuple):
    """Rows, flattened from [S, T] or [1, T], in the order of work: the wanted first."""

    keep: Tensor  # [S, T]
    order: Tensor  # [R]
    wanted: Tensor  # []: how many

    @classmethod
    def of(cls, keep: Tensor) -> "Work":
        order = keep.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        return cls(keep, order, keep.sum())
