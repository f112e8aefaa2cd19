"""Attention, its logsumexp, statistics and gradient by Triton kernels: launches and tiles.

The functions and their arguments are those of `attention_torch`. Sequences of a pack are cut into
tiles on the device, where a program finds its own in a table: nothing here waits for the device,
and the number of programs is bounded by N / tile + B, of which the surplus return at once. Half
precision goes to the tensor cores as it is, float32 as three tf32 products; mixed dtypes are
raised to the wider; float64 runs in the interpreter alone. Deterministic.

Letters: N tokens, H query heads, J key heads, K head dimension, B sequences, S student layers,
P programs.
"""

# pyright: reportCallIssue=false
# (a launch has keywords and unpacked tuples that the kernel's signature does not show)

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from oisd_kernels.attention_backward_kernels import attention_dkdv_kernel, attention_dq_kernel
from oisd_kernels.attention_geometry import Alignment, Geometry, Teacher
from oisd_kernels.attention_kernels import (
    attention_delta_kernel,
    attention_forward_kernel,
    attention_statistics_kernel,
)
from oisd_kernels.attention_tiles import Tiles, Work, launch_tile
from oisd_kernels.attention_tiles import widest as _widest

DELTA_ROWS = 32
STUDENTS = 4  # that a launch of the statistics takes at most
LOG2E = 1.4426950408889634

TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def widest(q: Tensor, dtype: torch.dtype, softcap: float | None) -> int:
    """The largest head dimension that can run on q's device; 0 where `dtype` cannot.

    dtype: the widest of all tensors, student's and teacher's.
    """
    return _widest(_capability(q, None), dtype, softcap)


def forward(
    q: Tensor,  # [N, H, K]
    k: Tensor,  # [N, J, K]
    v: Tensor,  # [N, J, K]
    geometry: Geometry,
    scale: float,
    capability: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention [N, H, K] in q's dtype, and logsumexp [H, N]; without a key 0 and -inf."""
    return _forward(q, k, v, geometry, scale, capability)


def logsumexp(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, capability: int | None = None
) -> Tensor:
    """[H, N], of the scaled and capped scores; -inf without a key."""
    return _forward(q, k, None, geometry, scale, capability)[1]


def statistics(
    q: Tensor,  # [N, H, K] or [S, N, H, K]
    k: Tensor,  # [N, J, K] or [S, N, J, K]
    lse: Tensor,  # [H, N] or [S, H, N]
    scale: float,
    teacher: Teacher,
    keep: Tensor | None,  # [N] bool
    divergence: str,
    beta: float,
    geometry: Geometry,
    capability: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence [N], the mean over heads, 0 where not kept; statistic [H, N] of `Alignment`.

    Of S student layers [S, N] and [S, H, N]; up to four of them share the teacher's scores. The
    forward KL has no statistic: [0, 0], [S, 0, 0].
    """
    settings = scale, teacher, keep, divergence, beta, geometry, capability
    if q.dim() == 3:
        value, statistic = statistics(q[None], k[None], lse[None], *settings)
        return value[0], statistic[0]
    parts = -(-len(q) // STUDENTS)
    groups = zip(*(x.tensor_split(parts) for x in (q, k, lse)), strict=True)
    value, statistic = zip(*(_statistics(*group, *settings) for group in groups), strict=True)
    return torch.cat(value).mean(1), torch.cat(statistic)


def backward(
    q: Tensor,  # [N, H, K]
    k: Tensor,  # [N, J, K]
    geometry: Geometry,
    scale: float,
    lse: Tensor,  # [H, N]
    *,
    v: Tensor | None = None,  # [N, J, K]
    out: Tensor | None = None,  # [N, H, K]
    d_out: Tensor | None = None,  # [N, H, K]
    d_lse: Tensor | None = None,  # [H, N]
    alignment: Alignment | None = None,
    capability: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v: of `forward` where v, out, d_out are given, of the alignment, both.

    Where both are given, tiles that no row of weight other than 0 reaches are left to a second
    launch, which reads no teacher.
    """
    dtype = _common(q, k, v, *(() if alignment is None else alignment.teacher[:2]))
    compute = _compute(dtype)
    student, keys = _ready(q, dtype), _ready(k, dtype)
    width = q.shape[-1]
    (N, H, K), J = student.shape, keys.shape[1]
    dq = student.new_empty(N, H, K, dtype=q.dtype)
    dk = student.new_empty(N, J, K, dtype=k.dtype)
    plain = v is not None
    values, d_out_, delta, dv = keys, student, None, dk
    if v is not None:
        assert out is not None and d_out is not None
        values, d_out_ = _ready(v, dtype), _ready(d_out, dtype)
        delta = _delta(_ready(out, dtype), d_out_, d_lse, compute)
        dv = student.new_empty(N, J, K, dtype=v.dtype)
    if N > 0:
        launch = _Backward(student, keys, values, d_out_, delta, lse, geometry, scale, capability)
        boost = _boost(dtype, d_out if plain else None, alignment, q)
        launch(dq, dk, dv, plain, alignment, boost)
    dq, dk, dv = (x[..., :width].contiguous() for x in (dq, dk, dv))
    return dq, dk, dv if plain else None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    geometry: Geometry,
    scale: float,
    capability: int | None,
) -> tuple[Tensor, Tensor]:
    dtype, width = _common(q, k, v), q.shape[-1]
    out_dtype = q.dtype
    q, k = _ready(q, dtype), _ready(k, dtype)
    values = k if v is None else _ready(v, dtype)
    N, H, K = q.shape
    lse = q.new_full((H, N), -math.inf, dtype=_compute(dtype))
    out = q.new_zeros(N, H, K, dtype=out_dtype) if v is not None else q
    if N > 0:
        tile = launch_tile(_capability(q, capability), "forward", dtype, K, geometry)
        tiles = Tiles.of(geometry, N, tile.m)
        attention_forward_kernel[(tiles.programs, H)](
            q, k, values, out, lse, tiles.table,
            N, H // k.shape[1], _window(geometry, N),
            *_strides(q), *_strides(k), *_strides(values), *_strides(out),
            SCALE=scale, **_mask(geometry), HAS_V=v is not None,
            HEAD_DIM=K, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=_block(K),
            **_arithmetic(q, dtype), **tile.options(),
        )  # fmt: skip
    return out if v is None else out[..., :width].contiguous(), lse


def _statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    teacher: Teacher,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
    capability: int | None,
) -> tuple[Tensor, Tensor]:
    dtype = _common(q, k, teacher.q, teacher.k)
    compute = _compute(dtype)
    q, k, qt, kt = (_ready(x, dtype) for x in (q, k, teacher.q, teacher.k))
    S, N, H, K = q.shape
    value = q.new_zeros(S, H, N, dtype=compute)
    statistic = torch.zeros_like(value) if divergence != "forward_kl" else value.new_empty(S, 0, 0)
    if N > 0:
        width = max(K, qt.shape[2])
        tile = launch_tile(_capability(q, capability), _statistics_name(S), dtype, width, geometry)
        tiles = Tiles.of(geometry, N, tile.m)
        attention_statistics_kernel[(tiles.programs, H)](
            q, k, qt, kt, _rows(lse, compute), _rows(teacher.lse, compute),
            None if keep is None else keep.to(torch.uint8), value, statistic, tiles.table,
            N, H // k.shape[2], H // kt.shape[1], _window(geometry, N),
            *_strides(q), *_strides(k), *_strides(qt), *_strides(kt),
            HAS_KEEP=keep is not None, STUDENTS=S, DIVERGENCE=divergence, BETA=beta,
            LOG_BETA=math.log(beta), LOG_1M_BETA=math.log1p(-beta),
            SCALE=scale, SCALE_T=teacher.scale, **_mask(geometry),
            HEAD_DIM=K, HEAD_DIM_T=qt.shape[2], BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=_block(K), BLOCK_KT=_block(qt.shape[2]),
            **_arithmetic(q, dtype), **tile.options(),
        )  # fmt: skip
    return value, statistic


def _statistics_name(students: int) -> str:
    """In the table of tiles: q of each student and of the teacher lies in shared memory."""
    return "statistics" if students == 1 else f"statistics of {2 if students == 2 else STUDENTS}"


def _delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None, compute: torch.dtype) -> Tensor:
    """rowsum(dO * O) - dLse, [H, N]."""
    N, H, K = out.shape
    delta = out.new_empty(H, N, dtype=compute)
    if N > 0:
        attention_delta_kernel[(-(-N // DELTA_ROWS), H)](
            out, d_out, None if d_lse is None else d_lse.contiguous(), delta,
            N, *_strides(out), *_strides(d_out),
            HAS_LSE=d_lse is not None, HEAD_DIM=K, BLOCK=DELTA_ROWS, BLOCK_K=_block(K),
            ACC=TL[compute], num_warps=4,
        )  # fmt: skip
    return delta


class _Backward:
    """The launches of one backward; what they share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        delta: Tensor | None,
        lse: Tensor,
        geometry: Geometry,
        scale: float,
        capability: int | None,
    ):
        self.q, self.k, self.v, self.d_out, self.delta = q, k, v, d_out, delta
        self.lse = _rows(lse, _compute(q.dtype))
        self.geometry, self.scale = geometry, scale
        self.capability = _capability(q, capability)

    def __call__(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        plain: bool,
        alignment: Alignment | None,
        boost: Tensor | None,
    ) -> None:
        q, k = self.q, self.k
        (N, H, K), J = q.shape, k.shape[1]
        terms = _RowTerms.of(self.lse, self.delta, alignment)
        qt, kt, divergence, beta, scale_t = q, k, "", 0.5, 1.0
        if alignment is not None:
            teacher, divergence, beta = alignment.teacher, alignment.divergence, alignment.beta
            qt, kt, scale_t = _ready(teacher.q, q.dtype), _ready(teacher.k, q.dtype), teacher.scale
        constants = {
            "SCALE": self.scale, "BOOST": boost is not None,
            "HEAD_DIM": K, "HEAD_DIM_T": qt.shape[2],
            "BLOCK_K": _block(K), "BLOCK_KT": _block(qt.shape[2]),
            **_mask(self.geometry), **_arithmetic(q, q.dtype),
        }  # fmt: skip
        inputs = q, k, self.v, self.d_out, qt, kt, *terms
        numbers = N, H // J, H // kt.shape[1], _window(self.geometry, N)
        strides = [s for x in (q, k, self.v, self.d_out, qt, kt) for s in _strides(x)]

        suffix = "" if alignment is None else " align" if plain else " alone"
        width = max(K, qt.shape[2])
        kind = q.dtype, width, self.geometry
        tile = launch_tile(self.capability, f"dq{suffix}", *kind)
        tiles = Tiles.of(self.geometry, N, tile.m)
        launches = self._launches(plain, divergence, beta, scale_t)
        for options in launches:
            attention_dq_kernel[(tiles.programs, H)](
                *inputs, boost, dq, tiles.table, *numbers, *strides, *_strides(dq),
                **options, SPLIT=tile.split and alignment is None, **constants,
                BLOCK_M=tile.m, BLOCK_N=tile.n, **tile.options(),
            )  # fmt: skip
        tile = launch_tile(self.capability, f"dkdv{suffix}", *kind)
        tiles = Tiles.of(self.geometry, N, tile.n)
        work = None if alignment is None else Work.of(self.geometry, tiles, terms.factor, tile.m)
        for options in launches:
            attention_dkdv_kernel[(tiles.programs, J)](
                *inputs, boost, dk, dv, tiles.table, *(work or (None,) * 4),
                *numbers, *strides, *_strides(dk), *_strides(dv),
                **options, SPLIT=tile.split and alignment is None, **constants,
                BLOCK_M=tile.m, BLOCK_N=tile.n, **tile.options(),
            )  # fmt: skip

    def _launches(
        self, plain: bool, divergence: str, beta: float, scale_t: float
    ) -> list[dict[str, Any]]:
        """Options that differ between the launches of a kernel; no divergence: no alignment."""
        log_odds = math.log(beta) - math.log1p(-beta)
        align = {"ALIGN": True, "DIVERGENCE": divergence, "LOG_ODDS": log_odds, "SCALE_T": scale_t}
        without = {"ALIGN": False, "DIVERGENCE": "", "LOG_ODDS": 0.0, "SCALE_T": 1.0}
        if not divergence:
            return [{"PLAIN": True, "TILES": "all", **without}]
        if not plain:
            return [{"PLAIN": False, "TILES": "all", **align}]
        return [
            {"PLAIN": True, "TILES": "live", **align},
            {"PLAIN": True, "TILES": "dead", **without},
        ]


class _RowTerms(NamedTuple):
    """What the gradient kernels read of a row: see there."""

    lse: Tensor  # [H, N]
    lse_t: Tensor  # [H, N]
    factor: Tensor  # [N]
    shift: Tensor  # [H, N]

    @classmethod
    def of(cls, lse: Tensor, delta: Tensor | None, alignment: Alignment | None) -> "_RowTerms":
        """lse in natural logarithm; delta None: the alignment alone."""

        def base2(x: Tensor) -> Tensor:
            x = _rows(x, lse.dtype)
            return torch.where(x == -math.inf, 0.0, x) * LOG2E

        if alignment is None:
            assert delta is not None
            return cls(base2(lse), lse, lse, delta)
        factor, beta = -_rows(alignment.row_weight, lse.dtype), alignment.beta
        if alignment.divergence == "forward_kl":
            shift = factor.expand_as(lse)
        else:
            mean = _rows(alignment.statistic, lse.dtype)
            if alignment.divergence == "jsd":
                factor = (1 - beta) * factor
            else:
                mean = -mean
            shift = torch.where(factor != 0, factor * mean, 0.0)
        shift = shift.contiguous() if delta is None else delta + shift
        return cls(base2(lse), base2(alignment.teacher.lse), factor, shift)


def _boost(
    dtype: torch.dtype, d_out: Tensor | None, alignment: Alignment | None, like: Tensor
) -> Tensor | None:
    """float16's range is short: a power of two that brings the largest upstream gradient near 1."""
    if dtype != torch.float16:
        return None
    largest = like.new_zeros((), dtype=torch.float32)
    for x in (d_out, None if alignment is None else alignment.row_weight):
        if x is not None:
            size = x.float().abs()
            largest = largest.maximum(torch.where(size.isfinite(), size, 0).amax())
    exponent = torch.where(largest > 0, largest, 1.0).log2().round().clamp(-100, 100)
    return torch.stack((torch.exp2(-exponent), torch.exp2(exponent)))


def _common(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds them all."""
    common = None
    for x in tensors:
        if x is not None:
            common = x.dtype if common is None else torch.promote_types(common, x.dtype)
    assert common is not None
    return common


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, rows and heads at multiples of 16, K a multiple of 16 (filled up with 0)."""
    x = x.to(dtype)
    if x.shape[-1] % 16:
        x = pad(x, (0, -x.shape[-1] % 16))
    numbers = x.data_ptr(), *_strides(x)
    if x.stride(-1) != 1 or any(number % 16 for number in numbers):
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of all dimensions but K; a stride that nothing uses must not enter the binary."""
    sizes = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes)


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _window(geometry: Geometry, tokens: int) -> int:
    """At most N, so that nothing overflows."""
    return 0 if geometry.window is None else min(geometry.window, tokens)


def _mask(geometry: Geometry) -> dict[str, Any]:
    window = geometry.window is not None
    return {"CAUSAL": geometry.causal, "WINDOW": window, "SOFTCAP": geometry.softcap}


def _arithmetic(x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    compute = _compute(dtype)
    # The interpreter's tl.dot takes the bits of bf16 for integers.
    operand = compute if x.device.type == "cpu" else dtype
    precision = "tf32x3" if operand == torch.float32 else None
    return {"OPERAND": TL[operand], "ACC": TL[compute], "PRECISION": precision}


def _capability(x: Tensor, capability: int | None) -> int:
    if capability is not None:
        return capability
    if x.device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
