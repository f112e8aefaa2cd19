"""The backward of the tiled losses: logits again, a slab of rows and a slice of the vocabulary at
a time, whose gradient dZ goes through a bounded scratch into the gradients of hidden and weight.

Why through memory. A program that kept dZ in registers would add each tile's product to a row of
dX that no registers hold: with tiles of 128 x 128, 2*128*128*D operations for 8*128*D bytes of
read and write in fp32, 32 a byte, where an H200 has about 200 operations for a byte. From a scratch
of R rows and L tokens each product runs over all of L, or R: dX is touched once for L/4 operations
a byte (960 at L = 3,840, which is 60 tiles of 64), W once for R (960 at D = 4,096), and the scratch
itself is 4 bytes written and read for 2*D operations. Nothing is added by atomics: the same bits
every time.

What it costs, with G = one 2*N*D*V matmul: 2S for the logits of the lens (teacher and student in
one program, which share the tile of W) or 1 of the log-prob; S or 1 for `hidden`; S or 1 for
`weight`. The sum to a gradient in half precision needs an fp32 accumulator, of the slab for
`hidden`, of the slice for `weight`, so that with both in half precision there are two orders of
work, slabs outside and slices outside, and the logits are computed twice. Where a gradient is in
the compute dtype it is its own accumulator.

                                    lens        log-prob
    hidden                          3S          2
    weight alone                    3S          2
    hidden, weight in fp32          4S          3
    hidden, weight in half          6S          4

What is left out. A tile is left out of the product for `hidden` if every row of its block keeps at
most the share SKIP / (tiles of V) of its mass there, the mass being sum_v |dZ[r, v]| as far as it
is known, which is never more than all of it. So a row loses at most SKIP of its mass, and

    |error of dX[r]| <= SKIP * sum_v |dZ[r, v]| * max_v |W[v]|

an eighth of the bound for rounding dZ, whatever the size of the gradient: where it is 1e-9 for
each of 150,000 tokens nothing is lost, and where nearly all of it lies in one tile nearly all the
others go. No tile is left out for `weight`: a rare token's row may have nothing but small entries.

dZ is kept in bf16 for bf16 operands, and in the compute dtype otherwise: float16 has no room for
1e-9, and multiplies as tf32, which holds its digits.

Letters: S student layers, N tokens, T of them in a slab, R = S*T rows, D width, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.gpu import GFX942, TL, is_aligned, row_strides, table_key
from oisd_kernels.lens.tiled.gradient_kernels import (
    tiled_lens_gradient_kernel,
    tiled_live_kernel,
    tiled_logprob_gradient_kernel,
    tiled_to_hidden_kernel,
    tiled_to_weight_kernel,
)
from oisd_kernels.lens.tiled.tiles import (
    ROW_BYTES,
    WORKSPACE,
    Head,
    Scores,
    Work,
    launch_tile,
    operand_kind,
)

TILES_OF_A_SLICE = 60  # bits of an int64 say which are live
ROWS_OF_A_SLAB = 2048  # more of them read W less often, and it is not W that limits then

# An eighth of the rounding of what dZ is multiplied as; fp16 as tf32.
SKIP = {
    torch.bfloat16: 2.0**-12,
    torch.float16: 2.0**-14,
    torch.float32: 2.0**-27,
    torch.float64: 2.0**-56,
}


class Product(NamedTuple):
    """Tile of a product with dZ; its rows and tokens are those of the gradient's tile."""

    width: int
    inner: int  # of the sum: tokens for `hidden`, rows for `weight`
    warps: int
    stages: int


PRODUCTS = {
    80: {
        ("hidden", "half"): Product(64, 64, 8, 3),  # 128 wide spills with Triton 3.8
        ("hidden", "fp32"): Product(64, 32, 8, 3),
        ("hidden", "odd"): Product(32, 16, 8, 2),
        ("weight", "half"): Product(128, 64, 8, 3),
        ("weight", "fp32"): Product(64, 32, 8, 3),
        ("weight", "odd"): Product(64, 16, 8, 2),
    },
    90: {
        ("hidden", "half"): Product(128, 64, 8, 4),
        ("hidden", "fp32"): Product(64, 32, 8, 3),
        ("hidden", "odd"): Product(64, 16, 8, 2),
        ("weight", "half"): Product(128, 64, 8, 4),
        ("weight", "fp32"): Product(64, 32, 8, 3),
        ("weight", "odd"): Product(64, 16, 8, 2),
    },
    GFX942: {
        ("hidden", "half"): Product(128, 64, 8, 2),
        ("hidden", "fp32"): Product(64, 32, 8, 2),
        ("hidden", "odd"): Product(64, 16, 8, 2),
        ("weight", "half"): Product(128, 64, 8, 2),
        ("weight", "fp32"): Product(64, 32, 8, 2),
        ("weight", "odd"): Product(64, 16, 8, 2),
    },
}
PRODUCTS[86] = PRODUCTS[80]  # where older and consumer cards look
INTERPRETED = Product(16, 16, 4, 1)


class Plan(NamedTuple):
    """How much of dZ is held at once.

    It is bounded whatever the numbers of tokens and of the vocabulary: they set how often a slab or
    a slice is taken, not how large it is.
    """

    tokens: int  # of a slab
    tiles: int  # of a slice
    bytes: int  # workspace that both take


class LensLoss(NamedTuple):
    """States are hidden [S, N, D] and teacher [1, N, D]."""

    divergence: str
    beta: float
    lse_p: Tensor  # [N]
    lse_q: Tensor  # [S, N]
    centre: Tensor  # [S, N]


class LogprobLoss(NamedTuple):
    """States are hidden [1, N, D]."""

    labels: Tensor  # [N]
    logsumexp: Tensor  # [N]
    rest: Tensor  # [N]: 1 - p of the label


class Gradients(NamedTuple):
    """Of what was asked for; the others are empty."""

    hidden: Tensor  # [S, N, D], dtype of hidden
    weight: Tensor  # [V, D], dtype of weight
    bias: Tensor  # [V], compute dtype


def allocate_gradients(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, wanted: tuple[bool, bool, bool]
) -> Gradients:
    def zeros(x: Tensor, shape: tuple[int, ...], wanted: bool, dtype: torch.dtype) -> Tensor:
        return x.new_zeros(shape if wanted else (0,), dtype=dtype)

    return Gradients(
        zeros(hidden, tuple(hidden.shape), wanted[0], hidden.dtype),
        zeros(weight, tuple(weight.shape), wanted[1] or wanted[2], weight.dtype),
        zeros(weight, (len(weight),), wanted[2], compute),
    )


class _Slab(NamedTuple):
    tokens: slice
    work: Work
    factor: Tensor  # [S, T]
    states: list[Tensor]  # [S, T, D] or [1, T, D]
    values: list[Tensor]  # of the loss, by token or by row


class Backward:
    """The state of one backward; `run` fills `out`."""

    def __init__(
        self,
        op: str,
        head: Head,
        loss: LensLoss | LogprobLoss,
        factor: Tensor,  # [S, N]: upstream gradient; rows of 0 are left out
        row_weight: Tensor | None,  # [S, N]: rows of 0 are left out too
        scores: Scores,
        out: Gradients,
        budget: int | None,
    ):
        self.op, self.head, self.loss = op, head, loss
        self.factor, self.row_weight = factor, row_weight
        self.scores, self.out, self.budget = scores, out, budget
        self.tile = launch_tile(
            head.capability, len(head.states), head.operand, head.aligned, False
        )
        self.operand = torch.bfloat16 if head.operand == torch.bfloat16 else head.compute
        self.precision = head.precision(self.operand)
        if head.operand == torch.float16 and head.capability != GFX942:
            self.precision = "tf32"
        V = len(head.weight)
        self.share = SKIP[head.operand] / -(-V // self.tile.v)

    def run(self) -> None:
        out, compute = self.out, self.head.compute
        to_hidden, to_weight = out.hidden.numel() > 0, out.weight.numel() > 0
        together = to_weight and out.weight.dtype == compute
        if to_hidden or together:
            self._slabs_outside(to_hidden, together)
        if to_weight and not together:
            self._slices_outside()

    def plan(self, to_hidden: bool, slices_outside: bool) -> Plan:
        """From the workspace: `row` bytes a row of a slab, `cell` a row in a tile of a slice."""
        compute = self.head.compute.itemsize
        S, (V, D) = len(self.factor), self.head.weight.shape
        row, cell = ROW_BYTES, self.tile.v * self.operand.itemsize + compute
        most = min(-(-V // self.tile.v), TILES_OF_A_SLICE)
        if slices_outside:
            column = self.tile.v * D * compute  # of a tile's accumulator
            budget = self._checked_budget(S * (row + cell) + column)
            tiles = max(min(budget // 2 // column, most), 1)
            rows = (budget - tiles * column) // (row + tiles * cell)
            if rows < S:
                tiles, rows = 1, (budget - column) // (row + cell)
            slab = self._slab_tokens(min(rows, 4 * ROWS_OF_A_SLAB))
            rows = slab * S
            return Plan(slab, tiles, rows * row + tiles * column + rows * tiles * cell)
        if to_hidden and self.out.hidden.dtype != self.head.compute:
            row += D * compute
        budget = self._checked_budget(S * (row + cell))
        slab = self._slab_tokens(min(budget // 2 // row, ROWS_OF_A_SLAB, budget // (row + cell)))
        rows = slab * S
        tiles = min((budget - rows * row) // (rows * cell), most)
        return Plan(slab, tiles, rows * row + rows * tiles * cell)

    def _checked_budget(self, needed: int) -> int:
        budget = WORKSPACE if self.budget is None else self.budget
        if budget < needed:
            wanted = f'be at least {needed} for a gradient with impl="tiled"'
            remedy = "one token against one tile of the vocabulary takes so much"
            raise checks.argument_error(self.op, "max_bytes", wanted, budget, remedy)
        return budget

    def _slab_tokens(self, rows: int) -> int:
        """Tokens of that many rows; fewer where it saves a block of rows that is mostly empty."""
        S, N = self.factor.shape
        tokens = max(rows // S, 1)
        blocks = tokens * S // self.tile.n
        whole = tokens if blocks == 0 else max(blocks * self.tile.n // S, 1)
        return min(whole, max(N, 1))

    def _slabs_outside(self, to_hidden: bool, to_weight: bool) -> None:
        plan = self.plan(to_hidden, False)
        scratch = _Scratch(self, plan)
        d_hidden, (S, N) = self.out.hidden, self.factor.shape
        own = d_hidden.dtype == self.head.compute
        rows = 0 if own or not to_hidden else S * plan.tokens
        buffer = scratch.dz.new_empty(rows, self.head.weight.shape[1], dtype=self.head.compute)
        for start in range(0, N, plan.tokens):
            slab = self._slab(slice(start, min(start + plan.tokens, N)))
            scratch.total.zero_()
            sums = d_hidden[:, slab.tokens] if to_hidden else d_hidden
            if to_hidden and not own:
                sums = buffer[: slab.factor.numel()].zero_().view(sums.shape)
            for first in range(0, len(self.head.weight), scratch.span):
                tiles = self._gradient(slab, scratch, first)
                if to_hidden:
                    self._to_hidden(slab, scratch, first, tiles, sums)
                if to_weight:
                    part = slice(first, first + scratch.span)
                    self._to_weight(slab, scratch, first, tiles, self.out.weight[part])
            if to_hidden and not own:
                d_hidden[:, slab.tokens] = sums

    def _slices_outside(self) -> None:
        plan = self.plan(False, True)
        scratch = _Scratch(self, plan)
        d_weight, N = self.out.weight, self.factor.shape[1]
        sums = d_weight.new_empty(scratch.span, d_weight.shape[1], dtype=self.head.compute)
        for first in range(0, len(d_weight), scratch.span):
            sums.zero_()
            for start in range(0, N, plan.tokens):
                slab = self._slab(slice(start, min(start + plan.tokens, N)))
                tiles = self._gradient(slab, scratch, first)
                self._to_weight(slab, scratch, first, tiles, sums)
            part = d_weight[first : first + scratch.span]
            part.copy_(sums[: len(part)])

    def _slab(self, tokens: slice) -> _Slab:
        factor = self.factor[:, tokens].to(self.head.compute)
        if self.row_weight is not None:
            factor = torch.where(self.row_weight[:, tokens] != 0, factor, 0)
        factor = factor.contiguous()
        values = [x[..., tokens].contiguous() for x in self.loss if isinstance(x, Tensor)]
        states = [x[:, tokens] for x in self.head.states]
        return _Slab(tokens, Work.of(factor != 0), factor, states, values)

    def _gradient(self, slab: _Slab, scratch: "_Scratch", first: int) -> int:
        """Fills the scratch with a slice of dZ, and says how many tiles that is."""
        head, tile, (V, D) = self.head, self.tile, self.head.weight.shape
        R, T = slab.factor.numel(), slab.factor.shape[1]
        tiles = -(-min(V - first, scratch.span) // tile.v)
        constants: dict[str, Any] = {}
        kernel: Any = tiled_logprob_gradient_kernel
        states = slab.states
        if isinstance(self.loss, LensLoss):
            kernel, states = tiled_lens_gradient_kernel, slab.states[::-1]
            beta = self.loss.beta
            constants = {
                "DIVERGENCE": self.loss.divergence,
                "BETA": beta,
                "LOG_BETA": math.log(beta),
                "LOG_1M_BETA": math.log1p(-beta),
            }
        cap = self.scores.softcap
        kernel[(-(-R // tile.n), tiles)](
            *states, head.weight, head.bias, slab.work.order, slab.work.wanted,
            *slab.values, slab.factor, scratch.dz, scratch.mass,
            T, D, V, R, first, *self.scores.scalars(),
            1.0 if cap is None else self.scores.temperature / cap,
            *(stride for x in states for stride in row_strides(x)),
            head.weight.stride(0), scratch.dz.stride(0),
            HAS_BIAS=head.bias is not None, SOFTCAP=cap is not None, **constants,
            BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_D=tile.d,
            OPERAND=TL[head.operand], ACC=TL[head.compute],
            PRECISION=head.precision(head.operand),
            **tile.options(),
        )  # fmt: skip
        return tiles

    def _to_hidden(
        self, slab: _Slab, scratch: "_Scratch", first: int, tiles: int, sums: Tensor
    ) -> None:
        head, tile, (V, D) = self.head, self.tile, self.head.weight.shape
        R, T = slab.factor.numel(), slab.factor.shape[1]
        blocks = -(-R // tile.n)
        choose: Any = tiled_live_kernel
        choose[(blocks,)](
            scratch.mass, scratch.total, scratch.live, slab.work.wanted, R, tiles, self.share,
            TILES=triton.next_power_of_2(len(scratch.mass)), BLOCK_N=tile.n, num_warps=8,
        )  # fmt: skip
        product = self._product("hidden", head.aligned and is_aligned(sums))
        multiply: Any = tiled_to_hidden_kernel
        multiply[(blocks, -(-D // product.width))](
            scratch.dz, head.weight, slab.work.order, slab.work.wanted, scratch.live, sums,
            T, D, V, first, scratch.dz.stride(0), head.weight.stride(0), *row_strides(sums),
            BLOCK_N=tile.n, TILE_V=tile.v, BLOCK_V=min(product.inner, tile.v),
            BLOCK_D=product.width, **self._matmul(product),
        )  # fmt: skip

    def _to_weight(
        self, slab: _Slab, scratch: "_Scratch", first: int, tiles: int, sums: Tensor
    ) -> None:
        head, tile, (V, D) = self.head, self.tile, self.head.weight.shape
        hidden, bias = slab.states[0], self.out.bias
        product = self._product("weight", head.aligned and is_aligned(sums))
        multiply: Any = tiled_to_weight_kernel
        multiply[(tiles, -(-D // product.width))](
            scratch.dz, hidden, slab.work.order, slab.work.wanted, sums, bias[first:],
            slab.factor.shape[1], D, V, first, scratch.dz.stride(0), *row_strides(hidden),
            sums.stride(0),
            BIAS=bias.numel() > 0, BLOCK_N=product.inner, BLOCK_V=tile.v,
            BLOCK_D=product.width, **self._matmul(product),
        )  # fmt: skip

    def _product(self, of: str, aligned: bool) -> Product:
        if self.head.capability == 0:
            return INTERPRETED
        kind = operand_kind(self.operand, aligned, True)
        return PRODUCTS[table_key(self.head.capability, PRODUCTS)][of, kind]

    def _matmul(self, product: Product) -> dict[str, Any]:
        return {
            "OPERAND": TL[self.operand],
            "ACC": TL[self.head.compute],
            "PRECISION": self.precision,
            "num_warps": product.warps,
            "num_stages": product.stages,
        }


class _Scratch:
    def __init__(self, backward: Backward, plan: Plan):
        head, tile = backward.head, backward.tile
        rows = plan.tokens * len(backward.factor)
        self.span = plan.tiles * tile.v

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return head.weight.new_empty(shape, dtype=dtype)

        self.dz = empty(rows, self.span, dtype=backward.operand)
        self.mass = empty(plan.tiles, rows, dtype=head.compute)
        self.total = empty(rows, dtype=head.compute)
        self.live = empty(-(-rows // tile.n), dtype=torch.int64)
