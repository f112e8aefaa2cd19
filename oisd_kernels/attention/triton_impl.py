"""Attention, its logsumexp, statistics and gradient by Triton kernels: launches and tiles.

The functions are those of `implementation`, which says what they are given. Sequences of a pack are
cut into tiles on the device, where a program finds its own in a table: nothing here waits for the
device, and the number of programs is bounded by N / tile + B, of which the surplus return at once.
Half precision goes to the tensor cores as it is, float32 as three tf32 products; mixed dtypes are
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
    capability_of,
    common_dtype,
    compute_of,
    ds_scale_of,
    mask_of,
    ready,
    rounded_up,
    rows_of,
    strides_of,
    window_of,
)
from oisd_kernels.attention.spec import Alignment, Geometry, Layer, Plain
from oisd_kernels.attention.tiles import Tiles, Work, kept_before, launch_tile
from oisd_kernels.attention.tiles import widest as _widest

DELTA_ROWS = 32


def widest(q: Tensor, dtype: torch.dtype, softcap: float | None) -> int:
    """The largest head dimension that can run on q's device; 0 where `dtype` cannot.

    dtype: the widest of all tensors, student's and teacher's.
    """
    return _widest(capability_of(q, None), dtype, softcap)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    geometry: Geometry,
    scale: float,
    sink: Tensor | None = None,
    capability: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Without v the logsumexp alone, and q in the place of out."""
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
            q, k, values, None if sink is None else rows_of(sink, lse.dtype), out, lse,
            tiles.table,
            N, H // k.shape[1], window_of(geometry, N),
            *strides_of(q, k, values, out),
            SCALE=scale, **mask_of(geometry), HAS_V=v is not None,
            HEAD_DIM=K, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=rounded_up(K),
            **arithmetic(q, dtype, capability), **tile.options(),
        )  # fmt: skip
    return out if v is None else out[..., :width].contiguous(), lse


def logsumexp(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, capability: int | None = None
) -> Tensor:
    return forward(q, k, None, geometry, scale, None, capability)[1]


def statistics(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
    capability: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The teacher's scores are computed once for all S layers."""
    tensors = student.q, student.k, teacher.q, teacher.k
    dtype = common_dtype(*tensors)
    compute = compute_of(dtype)
    q, k, qt, kt = (ready(x, dtype) for x in tensors)
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
            q, k, qt, kt, rows_of(student.lse, compute), rows_of(teacher.lse, compute),
            None if keep is None else keep.to(torch.uint8), value, statistic, tiles.table,
            S, N, H // k.shape[2], H // kt.shape[1], window_of(geometry, N),
            *strides_of(q, k, qt, kt),
            HAS_KEEP=keep is not None, STUDENTS=1 << (S - 1).bit_length(), DEPTH=tile.depth,
            DIVERGENCE=divergence, BETA=beta,
            LOG_BETA=math.log(beta), LOG_1M_BETA=math.log1p(-beta),
            SCALE=student.scale, SCALE_T=teacher.scale, **mask_of(geometry),
            HEAD_DIM=K, HEAD_DIM_T=qt.shape[2], BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=rounded_up(K), BLOCK_KT=rounded_up(qt.shape[2]),
            **arithmetic(q, dtype, capability), **tile.options(),
        )  # fmt: skip
    return value.mean(1), statistic


def backward(
    student: Layer,
    geometry: Geometry,
    plain: Plain | None,
    alignment: Alignment | None,
    capability: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where both gradients are wanted, tiles that no row of weight other than 0 reaches are left to
    a second launch, which reads no teacher.
    """
    tensors = [student.q, student.k, *(() if plain is None else (plain.v,))]
    dtype = common_dtype(*tensors, *(() if alignment is None else alignment.teacher[:2]))
    compute = compute_of(dtype)
    q, k = ready(student.q, dtype), ready(student.k, dtype)
    (N, H, K), J, width = q.shape, k.shape[1], student.q.shape[-1]
    dq, dk = (x.new_empty(x.shape, dtype=y.dtype) for x, y in ((q, student.q), (k, student.k)))
    # Where something is not wanted its pointers are any tensor's.
    v, d_out, delta_rows, dv = k, q, None, dk
    if plain is not None:
        v, d_out = ready(plain.v, dtype), ready(plain.d_out, dtype)
        delta_rows = delta(plain._replace(d_out=d_out), compute)
        dv = torch.empty_like(dk, dtype=plain.v.dtype)
    qt, kt = q, k
    if alignment is not None:
        qt, kt = ready(alignment.teacher.q, dtype), ready(alignment.teacher.k, dtype)
    if N > 0:
        capability = capability_of(q, capability)
        terms = RowTerms.of(rows_of(student.lse, compute), delta_rows, alignment)
        ds_scale = ds_scale_of(dtype, None if plain is None else plain.d_out, alignment, q)
        launches = _launches(plain is not None, alignment)
        constants = {
            "SCALE": student.scale, "SCALE_DS": ds_scale is not None,
            "HEAD_DIM": K, "HEAD_DIM_T": qt.shape[2],
            "BLOCK_K": rounded_up(K), "BLOCK_KT": rounded_up(qt.shape[2]),
            **mask_of(geometry), **arithmetic(q, dtype, capability),
        }  # fmt: skip
        inputs = q, k, v, d_out, qt, kt, *terms
        numbers = N, H // J, H // kt.shape[1], window_of(geometry, N)
        strides = strides_of(q, k, v, d_out, qt, kt)
        suffix = "" if alignment is None else " alone" if plain is None else " align"
        suffix += " mixed" if qt.shape[2] != K else ""
        kind = dtype, max(K, qt.shape[2]), geometry

        tile = launch_tile(capability, f"dq{suffix}", *kind)
        tiles = Tiles.of(geometry, N, tile.m)
        kept = None if alignment is None else kept_before(terms.factor)
        for options in launches:
            attention_dq_kernel[(tiles.programs, H)](
                *inputs, ds_scale, dq, tiles.table, kept, *numbers, *strides, *strides_of(dq),
                **options, SPLIT=tile.split and alignment is None, DEPTH=tile.depth,
                **constants,
                BLOCK_M=tile.m, BLOCK_N=tile.n, **tile.options(),
            )  # fmt: skip

        tile = launch_tile(capability, f"dkdv{suffix}", *kind)
        tiles = Tiles.of(geometry, N, tile.n)
        work = None if kept is None else Work.of(geometry, tiles, kept, tile.m)
        for options in launches:
            attention_dkdv_kernel[(tiles.programs, J)](
                *inputs, ds_scale, dk, dv, tiles.table, *(work or (None,) * 4),
                *numbers, *strides, *strides_of(dk, dv),
                **options, SPLIT=tile.split and alignment is None, DEPTH=tile.depth,
                **constants,
                BLOCK_M=tile.m, BLOCK_N=tile.n, **tile.options(),
            )  # fmt: skip
    dq, dk, dv = (x[..., :width].contiguous() for x in (dq, dk, dv))
    return dq, dk, None if plain is None else dv


def _launches(plain: bool, alignment: Alignment | None) -> list[dict[str, Any]]:
    """Options that differ between the launches of a gradient kernel."""
    without = {"ALIGN": False, "DIVERGENCE": "", "LOG_ODDS": 0.0, "SCALE_T": 1.0}
    if alignment is None:
        return [{"PLAIN": True, "TILES": "all", **without}]
    align = {
        "ALIGN": True, "DIVERGENCE": alignment.divergence,
        "LOG_ODDS": math.log(alignment.beta) - math.log1p(-alignment.beta),
        "SCALE_T": alignment.teacher.scale,
    }  # fmt: skip
    if not plain:
        return [{"PLAIN": False, "TILES": "all", **align}]
    return [
        {"PLAIN": True, "TILES": "live", **align},
        {"PLAIN": True, "TILES": "dead", **without},
    ]


def delta(plain: Plain, compute: torch.dtype) -> Tensor:
    """rowsum(dO * O) - dLse, [H, N]."""
    if plain.delta is not None:
        return plain.delta.to(compute)
    dtype = common_dtype(plain.out, plain.d_out)
    out, d_out, d_lse = ready(plain.out, dtype), ready(plain.d_out, dtype), plain.d_lse
    N, H, K = out.shape
    found = out.new_empty(H, N, dtype=compute)
    if N > 0:
        attention_delta_kernel[(-(-N // DELTA_ROWS), H)](
            out, d_out, None if d_lse is None else d_lse.contiguous(), found,
            N, *strides_of(out, d_out),
            HAS_LSE=d_lse is not None, HEAD_DIM=K, BLOCK=DELTA_ROWS, BLOCK_K=rounded_up(K),
            ACC=TL[compute], num_warps=4,
        )  # fmt: skip
    return found
