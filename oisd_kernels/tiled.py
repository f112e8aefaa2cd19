"""`logit_lens_divergence(impl="tiled")`: no logits in memory, whatever N and V. Values only.

    kl's    one pass over the vocabulary                                       2S G
    jsd     logsumexp of the teacher and of S students, then the divergence    3S + 1 G

with G = one 2*N*D*V matmul. It is for metrics and for memory: "chunked" computes gradients, and to
ask this one for them is an error. Tokens are taken in slabs, and the vocabulary is split over
programs where a slab has too few rows to fill the machine, both such that the workspace beyond the
outputs stays bounded whatever N and V. Rows of weight 0 are sorted to the end of a slab, where
programs return at once: the host never waits for their number. Deterministic.

Half precision goes to the tensor cores as it is, float32 (and mixed dtypes) as three tf32 products;
float64 has no tensor core here and runs in the interpreter alone.

Letters: S student layers, N tokens, T of them in a slab, R = S*T rows, D width, V vocabulary,
K splits.
"""

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.reference import LensStats
from oisd_kernels.tiled_kernels import (
    tiled_jsd_kernel,
    tiled_kl_kernel,
    tiled_statistics_kernel,
)

OP = "logit_lens_divergence"
WORKSPACE = 32 << 20
FIELDS = 9  # of a row and a split, 4 bytes each: the most that a kernel leaves behind
ROW_BYTES = 192  # of a row once: order of work, sort, combined values in float64


class Tile(NamedTuple):
    n: int  # rows
    v: int  # tokens of the vocabulary
    d: int  # width
    warps: int
    stages: int


# By architecture, number of accumulators, and operands: "half", where "more" has bias, softcap or
# statistics to hold; "fp32"; "odd" where an address or a stride is no multiple of 16 and loads
# cannot be vectorised. Without spills, not tuned.
TILES = {
    80: {
        (1, "half"): Tile(128, 128, 64, 8, 3),
        (1, "more"): Tile(128, 128, 64, 8, 3),
        (1, "fp32"): Tile(64, 64, 32, 4, 3),
        (1, "odd"): Tile(64, 64, 16, 8, 2),
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
}
TILES[86] = TILES[80] | {(2, "more"): Tile(128, 64, 32, 8, 3)}  # 99 KB of shared memory
TILES[100] = TILES[90] | {
    (2, "half"): Tile(128, 64, 64, 8, 4),
    (2, "fp32"): Tile(64, 64, 16, 8, 3),
}
INTERPRETED = Tile(16, 32, 16, 4, 1)

TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def lens_divergence_tiled(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: bool = False,
    max_bytes: int | None = None,
) -> Tensor | tuple[Tensor, LensStats]:
    """`oisd_kernels.logit_lens_divergence` without logits in memory; arguments as there.

    max_bytes: workspace beyond the outputs, 32 MB by default, and some 10 MB more that do not grow.
        A tensor whose last dimension is not contiguous is copied on top of it.

    Raises:
        ValueError: a gradient is wanted, the tensors are on a CPU without TRITON_INTERPRET=1, one
            is float64 outside the interpreter, or the budget is too small for one token.
    """
    tensors = [hidden, teacher_hidden, weight] + ([] if bias is None else [bias])
    _check(hidden, weight, bias, grad_weight, any(x.dtype == torch.float64 for x in tensors))
    layers = hidden.detach() if hidden.dim() == 3 else hidden.detach()[None]
    S, N, _ = layers.shape
    wide = any(x.dtype == torch.float64 for x in tensors)
    compute = torch.float64 if wide else torch.float32
    run = Run(layers, teacher_hidden.detach(), weight.detach(), bias, compute, max_bytes)
    row_weight = hidden.new_ones((), dtype=compute) if token_weight is None else token_weight
    row_weight = row_weight.detach().to(compute).expand(S, N)
    rows = run(row_weight, divergence, beta, temperature, logit_softcap, return_stats)

    shape = hidden.shape[:-1]
    loss = row_weight * rows.divergence
    if token_weight is not None:  # 0 * inf is NaN
        loss = torch.where(row_weight != 0, loss, 0)
    loss = loss.view(shape)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (row_weight != 0).sum().clamp_min(1)
    if not return_stats:
        return loss
    per_row = (x.view(shape) for x in (rows.student_entropy, rows.top1_agreement, rows.divergence))
    student_entropy, agreement, value = per_row
    return loss, LensStats(student_entropy, rows.teacher_entropy, agreement, value)


def launch_tile(
    capability: int, accumulators: int, operand: torch.dtype, aligned: bool, plain: bool
) -> Tile:
    """The tile for a compute capability (90 for sm_90); 0 is the interpreter."""
    if capability == 0:
        return INTERPRETED
    known = 86 if capability >= 120 else max((c for c in TILES if c <= capability), default=86)
    half = "half" if plain else "more"
    kind = "odd" if not aligned else "fp32" if operand == torch.float32 else half
    return TILES[known][accumulators, kind]


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, grad_weight: bool, wide: bool
) -> None:
    head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and (hidden.requires_grad or (grad_weight and head)):
        remedy = "call it under torch.no_grad() or with hidden.detach() for the value alone"
        wanted = 'be "chunked" or "reference" where a gradient is wanted'
        raise checks.argument_error(OP, "impl", wanted, "'tiled'", remedy)
    if hidden.is_cuda:
        if wide:
            remedy = 'cast them to float32, or use impl="chunked"'
            raise checks.argument_error(
                OP, "hidden", 'have no float64 beside it with impl="tiled"', "float64", remedy
            )
    elif hidden.device.type == "cpu" and not _interpreted():
        remedy = "set TRITON_INTERPRET=1 before Triton is imported to try it on a CPU"
        raise checks.argument_error(
            OP, "hidden", 'be on a GPU with impl="tiled"', hidden.device, remedy
        )


def _interpreted() -> bool:
    return type(tiled_jsd_kernel).__name__ == "InterpretedFunction"


class Run:
    """The state of one call."""

    def __init__(
        self,
        hidden: Tensor,  # [S, N, D]
        teacher: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,
        compute: torch.dtype,
        max_bytes: int | None,
        capability: int | None = None,
    ):
        tensors = (_unit_stride(x) for x in (hidden, teacher[None], weight))
        self.hidden, self.teacher, self.weight = tensors
        self.bias = None if bias is None else bias.detach().contiguous()
        self.compute = compute
        self.aligned = all(_aligned(x) for x in (self.hidden, self.teacher, self.weight))
        if capability is None:
            capability, self.programs = _machine(hidden.device)
        else:
            self.programs = 264
        self.capability = capability
        half = {hidden.dtype, teacher.dtype, weight.dtype} in ({torch.float16}, {torch.bfloat16})
        # The interpreter's tl.dot takes the bits of bf16 for integers.
        self.operand = weight.dtype if half and capability > 0 else compute
        self.slab = self._slab(hidden.shape[0], WORKSPACE if max_bytes is None else max_bytes)

    def __call__(
        self,
        row_weight: Tensor,  # [S, N]
        divergence: str,
        beta: float,
        temperature: float,
        softcap: float | None,
        stats: bool,
    ) -> LensStats:
        S, N = row_weight.shape
        out = LensStats(*(row_weight.new_zeros(*x) for x in ((S, N), (N,), (S, N), (S, N))))
        for start in range(0, N, self.slab):
            tokens = slice(start, min(start + self.slab, N))
            slab = _Slab(self, tokens, row_weight[:, tokens] != 0, temperature, softcap, stats)
            got = slab.jsd(beta) if divergence == "jsd" else slab.kl(divergence == "forward_kl")
            for whole, part in zip(out, got, strict=True):
                if part is not None:
                    whole[..., tokens] = part
        return out

    def _slab(self, layers: int, budget: int) -> int:
        token = (layers + 1) * (ROW_BYTES + FIELDS * self.compute.itemsize)
        if budget < token:
            remedy = f"one token of {layers} layers takes so much"
            raise checks.argument_error(
                OP, "max_bytes", f'be at least {token} with impl="tiled"', budget, remedy
            )
        return budget // token


class _Slab:
    """Tokens that are worked on at once, and their rows: the wanted first."""

    def __init__(
        self,
        run: Run,
        tokens: slice,
        keep: Tensor,  # [S, T]
        temperature: float,
        softcap: float | None,
        stats: bool,
    ):
        self.run, self.stats = run, stats
        self.rows = _Work.of(keep)
        self.hidden, self.teacher = run.hidden[:, tokens], run.teacher[:, tokens]
        cap = 1.0 if softcap is None else softcap
        self.scalars = cap, 1 / cap, 1 / temperature
        self.capped = softcap is not None
        self.plain = not (stats or self.capped or run.bias is not None)

    def kl(self, forward: bool) -> tuple[Tensor | None, ...]:
        """KL(a||b), where a is the teacher if `forward`."""
        a, b = (self.teacher, self.hidden) if forward else (self.hidden, self.teacher)
        out, top1 = self._launch(tiled_kl_kernel, 2, 7, (a, b), self.rows, ())
        rows = _Splits(out[0], out[1], top1[0]), _Splits(out[2], out[3], top1[1])
        (a, b), gap = rows, out[4].double()
        # Over all splits: what the maxima lack to the largest belongs to the gap.
        gap = (a.share * (gap + (a.behind - b.behind) * a.l)).sum(0)
        value = self._put(gap / a.total + (b.total / a.total).log())
        if not self.stats:
            return None, None, None, value
        entropies = self._put(a.entropy(out[5])), self._put(b.entropy(out[6]))
        teacher, student = entropies if forward else entropies[::-1]
        agreement = self._put((a.top1() == b.top1()).double())
        return student, teacher.amax(0), agreement, value

    def jsd(self, beta: float) -> tuple[Tensor | None, ...]:
        kept = _Work.of(self.rows.keep.any(0, keepdim=True)) if len(self.hidden) > 1 else self.rows
        p_out, p_top = self._statistics(self.teacher, kept)
        q_out, q_top = self._statistics(self.hidden, self.rows)
        p, q = _Splits(p_out[0], p_out[1], p_top), _Splits(q_out[0], q_out[1], q_top)
        lse_p = self._put(p.logsumexp(), kept)
        lse_q = self._put(q.logsumexp())
        constants = {"BETA": beta, "LOG_BETA": math.log(beta), "LOG_1M_BETA": math.log1p(-beta)}
        out, _ = self._launch(
            tiled_jsd_kernel,
            2,
            1,
            (self.teacher, self.hidden),
            self.rows,
            (lse_p, lse_q),
            constants,
        )
        value = self._put(out[0].double().sum(0))
        if not self.stats:
            return None, None, None, value
        p_top1, q_top1 = self._put(p.top1(), kept), self._put(q.top1())
        agreement = torch.where(self.rows.keep & (p_top1 == q_top1), 1.0, 0.0)
        entropy = self._put(p.entropy(p_out[2]), kept)[0]
        return self._put(q.entropy(q_out[2])), entropy, agreement, value

    def _statistics(self, x: Tensor, rows: "_Work") -> tuple[Tensor, Tensor]:
        out, top1 = self._launch(tiled_statistics_kernel, 1, 3, (x,), rows, ())
        return out, top1[0]

    def _launch(
        self,
        kernel: Any,
        accumulators: int,
        fields: int,
        states: tuple[Tensor, ...],  # [S, T, D] or [1, T, D] each
        rows: "_Work",
        row_values: tuple[Tensor, ...],
        constants: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fields [F, K, R] and tokens [accumulators, K, R], rows in the order of work."""
        run, R, T = self.run, rows.keep.numel(), rows.keep.shape[1]
        V, D = run.weight.shape
        tile = launch_tile(run.capability, accumulators, run.operand, run.aligned, self.plain)
        blocks, tiles = -(-R // tile.n), -(-V // tile.v)
        span = -(-tiles // min(tiles, max(run.programs // blocks, 1)))
        K = -(-tiles // span)
        out = run.weight.new_empty(fields, K, R, dtype=run.compute)
        top1 = run.weight.new_empty(accumulators, K, R, dtype=torch.int32)
        if kernel is tiled_jsd_kernel:
            outputs = (*row_values, out)
        else:
            outputs = (out, top1)
            constants = {"STATS": self.stats}
        strides = [
            stride for x in states for stride in (x.stride(0) if len(x) > 1 else 0, x.stride(1))
        ]
        kernel[(blocks, K)](
            *states, run.weight, run.bias, rows.order, rows.wanted, *outputs,
            T, D, V, R, span * tile.v, *self.scalars, *strides, run.weight.stride(0),
            HAS_BIAS=run.bias is not None, SOFTCAP=self.capped, **(constants or {}),
            BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_D=tile.d,
            OPERAND=TL[run.operand], ACC=TL[run.compute],
            PRECISION="tf32x3" if run.operand == torch.float32 else None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out, top1

    def _put(self, values: Tensor, rows: "_Work | None" = None) -> Tensor:
        """values [R] in the order of work -> [S, T] (or as `rows`), 0 where not wanted."""
        rows = self.rows if rows is None else rows
        dtype = values.dtype if values.dtype == torch.int64 else self.run.compute
        out = values.new_zeros(rows.keep.numel(), dtype=dtype)
        out[rows.order] = values.to(dtype)
        return torch.where(rows.keep, out.view(rows.keep.shape), 0)


class _Work(NamedTuple):
    """Rows, flattened from [S, T] or [1, T], in the order of work: the wanted first."""

    keep: Tensor  # [S, T]
    order: Tensor  # [R]
    wanted: Tensor  # []: how many

    @classmethod
    def of(cls, keep: Tensor) -> "_Work":
        order = keep.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        return cls(keep, order, keep.sum())


class _Splits:
    """Sums of a softmax over splits of the vocabulary, in float64: m, l [K, R]."""

    def __init__(self, m: Tensor, l: Tensor, top1: Tensor):  # noqa: E741
        self.m, self.l, self.place = m.double(), l.double(), top1
        self.largest = self.m.amax(0)
        self.behind = self.m - self.largest
        self.share = self.behind.exp()
        self.total = (self.share * self.l).sum(0)

    def logsumexp(self) -> Tensor:
        return self.largest + self.total.log()

    def entropy(self, moment: Tensor) -> Tensor:
        moment = (self.share * (moment.double() + self.behind * self.l)).sum(0)
        return self.total.log() - moment / self.total

    def top1(self) -> Tensor:
        """The first token of the largest score."""
        beyond = torch.iinfo(torch.int32).max
        return torch.where(self.behind == 0, self.place, beyond).amin(0).long()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _aligned(x: Tensor) -> bool:
    """Whether Triton sees that rows start at multiples of 16 bytes."""
    sixteen = [x.shape[-1], x.data_ptr(), *(s for s in x.stride()[:-1])]
    return all(number % 16 == 0 for number in sixteen)


def _machine(device: torch.device) -> tuple[int, int]:
    """Compute capability, and how many programs are wanted at once: two waves of them."""
    if device.type == "cpu":
        return 0, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, 2 * properties.multi_processor_count
