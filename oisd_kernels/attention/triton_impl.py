"""Attention, its logsumexp, statistics and gradient by Triton kernels: launches and tiles.

The functions and their arguments are those of `attention_torch`. Sequences of a pack are cut into
tiles on the device, where a program finds its own in a table: nothing here waits for the device,
and the number of programs is bounded by N / tile + B, of which the surplus return at once. Half
precision goes to the tensor cores as it is, float32 as three tf32 products; mixed dtypes are
raised to the wider; float64 runs in the interpreter alone. Deterministic.

Letters: N tokens, H query heads, J key heads, K head dimension, B sequences, S student layers,
P programs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch has keywords and unpacked tuples that the kernel's signature does not show, and gives
# plain values to the kernel's constexprs)

import math
from typing import Any

import torch
from torch import Tensor

from oisd_kernels.attention.backward_kernels import attention_dkdv_kernel, attention_dq_kernel
from oisd_kernels.attention.kernels import (
    attention_delta_kernel,
    attention_forward_kernel,
    attention_statistics_kernel,
)
from oisd_kernels.attention.launch import (
    TL,
    RowTerms,
    arithmetic,
    boost_of,
    capability_of,
    common_dtype,
    compute_of,
    mask_of,
    ready,
    rounded_up,
    rows_of,
    strides_of,
    window_of,
)
from oisd_kernels.attention.spec import Alignment, Geometry, Teacher
from oisd_kernels.attention.tiles import Tiles, Work, kept_before, launch_tile
from oisd_kernels.attention.tiles import widest as _widest

DELTA_ROWS = 32


def widest(q: Tensor, dtype: torch.dtype, softcap: float | None) -> int:
    """The largest head dimension that can run on q's device; 0 where `dtype` cannot.

    dtype: the widest of all tensors, student's and teacher's.
    """
    return _widest(capability_of(q, None), dtype, softcap)


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

    Of S student layers [S, N] and [S, H, N]; the teacher's scores are computed once. The forward
    KL has no statistic: [0, 0], [S, 0, 0].
    """
    settings = scale, teacher, keep, divergence, beta, geometry, capability
    if q.dim() == 3:
        value, statistic = statistics(q[None], k[None], lse[None], *settings)
        return value[0], statistic[0]
    value, statistic = _statistics(q, k, lse, *settings)
    return value.mean(1), statistic


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
    dtype = common_dtype(q, k, v, *(() if alignment is None else alignment.teacher[:2]))
    compute = compute_of(dtype)
    student, keys = ready(q, dtype), ready(k, dtype)
    width = q.shape[-1]
    (N, H, K), J = student.shape, keys.shape[1]
    dq = student.new_empty(N, H, K, dtype=q.dtype)
    dk = student.new_empty(N, J, K, dtype=k.dtype)
    plain = v is not None
    values, d_out_, delta, dv = keys, student, None, dk
    if v is not None:
        assert out is not None and d_out is not None
        values, d_out_ = ready(v, dtype), ready(d_out, dtype)
        delta = _delta(ready(out, dtype), d_out_, d_lse, compute)
        dv = student.new_empty(N, J, K, dtype=v.dtype)
    if N > 0:
        launch = _Backward(student, keys, values, d_out_, delta, lse, geometry, scale, capability)
        boost = boost_of(dtype, d_out if plain else None, alignment, q)
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
    dtype, width = common_dtype(q, k, v), q.shape[-1]
    out_dtype = q.dtype
    q, k = ready(q, dtype), ready(k, dtype)
    values = k if v is None else ready(v, dtype)
    N, H, K = q.shape
    lse = q.new_full((H, N), -math.inf, dtype=compute_of(dtype))
    out = q.new_zeros(N, H, K, dtype=out_dtype) if v is not None else q
    if N > 0:
        capability = capability_of(q, capability)
        tile = launch_tile(capability, "forward", dtype, K, geometry)
        tiles = Tiles.of(geometry, N, tile.m)
        attention_forward_kernel[(tiles.programs, H)](
            q, k, values, out, lse, tiles.table,
            N, H // k.shape[1], window_of(geometry, N),
            *strides_of(q, k, values, out),
            SCALE=scale, **mask_of(geometry), HAS_V=v is not None,
            HEAD_DIM=K, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=rounded_up(K),
            **arithmetic(q, dtype, capability), **tile.options(),
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
    dtype = common_dtype(q, k, teacher.q, teacher.k)
    compute = compute_of(dtype)
    q, k, qt, kt = (ready(x, dtype) for x in (q, k, teacher.q, teacher.k))
    S, N, H, K = q.shape
    value = q.new_zeros(S, H, N, dtype=compute)
    statistic = torch.zeros_like(value) if divergence != "forward_kl" else value.new_empty(S, 0, 0)
    if N > 0:
        width = max(K, qt.shape[2])
        name = "statistics" if S == 1 else "statistics of several"
        capability = capability_of(q, capability)
        tile = launch_tile(capability, name, dtype, width, geometry)
        tiles = Tiles.of(geometry, N, tile.m)
        attention_statistics_kernel[(tiles.programs, H)](
            q, k, qt, kt, rows_of(lse, compute), rows_of(teacher.lse, compute),
            None if keep is None else keep.to(torch.uint8), value, statistic, tiles.table,
            S, N, H // k.shape[2], H // kt.shape[1], window_of(geometry, N),
            *strides_of(q, k, qt, kt),
            HAS_KEEP=keep is not None, STUDENTS=1 << (S - 1).bit_length(), DEPTH=tile.depth,
            DIVERGENCE=divergence, BETA=beta,
            LOG_BETA=math.log(beta), LOG_1M_BETA=math.log1p(-beta),
            SCALE=scale, SCALE_T=teacher.scale, **mask_of(geometry),
            HEAD_DIM=K, HEAD_DIM_T=qt.shape[2], BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=rounded_up(K), BLOCK_KT=rounded_up(qt.shape[2]),
            **arithmetic(q, dtype, capability), **tile.options(),
        )  # fmt: skip
    return value, statistic


def _delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None, compute: torch.dtype) -> Tensor:
    """rowsum(dO * O) - dLse, [H, N]."""
    N, H, K = out.shape
    delta = out.new_empty(H, N, dtype=compute)
    if N > 0:
        attention_delta_kernel[(-(-N // DELTA_ROWS), H)](
            out, d_out, None if d_lse is None else d_lse.contiguous(), delta,
            N, *strides_of(out, d_out),
            HAS_LSE=d_lse is not None, HEAD_DIM=K, BLOCK=DELTA_ROWS, BLOCK_K=rounded_up(K),
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
        self.lse = rows_of(lse, compute_of(q.dtype))
        self.geometry, self.scale = geometry, scale
        self.capability = capability_of(q, capability)

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
        terms = RowTerms.of(self.lse, self.delta, alignment)
        qt, kt, divergence, beta, scale_t = q, k, "", 0.5, 1.0
        if alignment is not None:
            teacher, divergence, beta = alignment.teacher, alignment.divergence, alignment.beta
            qt, kt, scale_t = ready(teacher.q, q.dtype), ready(teacher.k, q.dtype), teacher.scale
        constants = {
            "SCALE": self.scale, "SCALE_DS": boost is not None,
            "HEAD_DIM": K, "HEAD_DIM_T": qt.shape[2],
            "BLOCK_K": rounded_up(K), "BLOCK_KT": rounded_up(qt.shape[2]),
            **mask_of(self.geometry), **arithmetic(q, q.dtype, self.capability),
        }  # fmt: skip
        inputs = q, k, self.v, self.d_out, qt, kt, *terms
        numbers = N, H // J, H // kt.shape[1], window_of(self.geometry, N)
        strides = strides_of(q, k, self.v, self.d_out, qt, kt)

        suffix = "" if alignment is None else " align" if plain else " alone"
        if qt.shape[2] != K:
            suffix += " mixed"
        width = max(K, qt.shape[2])
        kind = q.dtype, width, self.geometry
        tile = launch_tile(self.capability, f"dq{suffix}", *kind)
        tiles = Tiles.of(self.geometry, N, tile.m)
        launches = self._launches(plain, divergence, beta, scale_t)
        kept = None if alignment is None else kept_before(terms.factor)
        for options in launches:
            attention_dq_kernel[(tiles.programs, H)](
                *inputs, boost, dq, tiles.table, kept, *numbers, *strides, *strides_of(dq),
                **options, SPLIT=tile.split and alignment is None, DEPTH=tile.depth,
                **constants,
                BLOCK_M=tile.m, BLOCK_N=tile.n, **tile.options(),
            )  # fmt: skip
        tile = launch_tile(self.capability, f"dkdv{suffix}", *kind)
        tiles = Tiles.of(self.geometry, N, tile.n)
        work = None if kept is None else Work.of(self.geometry, tiles, kept, tile.m)
        for options in launches:
            attention_dkdv_kernel[(tiles.programs, J)](
                *inputs, boost, dk, dv, tiles.table, *(work or (None,) * 4),
                *numbers, *strides, *strides_of(dk, dv),
                **options, SPLIT=tile.split and alignment is None, DEPTH=tile.depth,
                **constants,
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
