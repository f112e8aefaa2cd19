"""Gradients of the tiled losses, a slice of the vocabulary at a time.

    tiled_lens_gradient_kernel     logits of student and teacher again -> gradient of the student's
    tiled_logprob_gradient_kernel  logits again -> gradient of the label's log-probability
    tiled_live_kernel              which tiles of it are worth a matmul
    tiled_to_hidden_kernel         dX[r] += sum_v dZ[r, v] W[v], over the live tiles
    tiled_to_weight_kernel         dW[v] += sum_r dZ[r, v] X[r], and dBias[v] += sum_r dZ[r, v]

The first two project as the value passes do and leave the gradient dZ [R, slice] of raw logits in
memory, with the mass sum_v |dZ| of every row and tile. `oisd_kernels.lens.tiled.gradient` says why
dZ passes through memory at all, and which tiles are left out.

Letters: R rows, T tokens of a slab, D width, V vocabulary; `first` is the slice's first token. dZ,
Mass and Live are in the order of work, everything else by row.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes the unpacking of what a kernel's function returns for the unpacking of nothing)

import triton
import triton.language as tl

from oisd_kernels.divergences import log_probability, terms
from oisd_kernels.lens.tiled.kernels import project, row_block, scores


@triton.jit
def leave(
    d, z, dZ, Mass, factor, n, in_n, R, stride_dz, per_cap,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Stores factor * d, the gradient to scores z, as that to raw logits; its mass, unfactored."""
    if SOFTCAP:
        # Past V, z is far below any cap.
        t = tl.minimum(tl.abs(z * per_cap), 1.0)
        d *= 1 - t * t
    tile = tl.program_id(1)
    tl.store(Mass + tile.to(tl.int64) * R + n, tl.sum(tl.abs(d), 1), mask=in_n)
    d *= factor[:, None]
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    at = dZ + n.to(tl.int64)[:, None] * stride_dz + v[None, :]
    tl.store(at, d.to(dZ.dtype.element_ty), mask=in_n[:, None])


@triton.jit
def tiled_lens_gradient_kernel(
    Xp,  # [S, T, D]: teacher
    Xq,  # [S, T, D]: student
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    LseP,  # [T]
    LseQ,  # [R]
    Centre,  # [R]
    Factor,  # [R]
    dZ,  # [R, slice]
    Mass,  # [tiles, R]
    T,
    D,
    V,
    R,
    first,
    softcap,
    per_softcap,
    per_temperature,
    per_cap,  # of scores
    stride_ps,
    stride_pn,
    stride_qs,
    stride_qn,
    stride_w,
    stride_dz,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, p_row, q_row = row_block(
        Rows, Count, T, stride_ps, stride_pn, stride_qs, stride_qn, BLOCK_N
    )
    v = first + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = v < V
    zp, zq = project(
        Xp, Xq, W, p_row, q_row, in_n, v, in_v, D, stride_w,
        True, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
    )  # fmt: skip
    zp = scores(zp, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
    zq = scores(zq, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
    lp = log_probability(zp, tl.load(LseP + t, mask=in_n, other=0.0)[:, None])
    lq = log_probability(zq, tl.load(LseQ + r, mask=in_n, other=0.0)[:, None])
    term, inner, q = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
    factor = tl.load(Factor + r, mask=in_n, other=0.0) * per_temperature
    if DIVERGENCE == "forward_kl":
        d = q - inner
    else:
        d = q * (tl.load(Centre + r, mask=in_n, other=0.0)[:, None] - inner)
    if DIVERGENCE == "jsd":
        factor *= 1 - BETA
    leave(d, zq, dZ, Mass, factor, n, in_n, R, stride_dz, per_cap, SOFTCAP, BLOCK_V)


@triton.jit
def tiled_logprob_gradient_kernel(
    X,  # [1, T, D]
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    Labels,  # [R]
    LogSumExp,  # [R]
    Factor,  # [R]
    dZ,  # [R, slice]
    Mass,  # [tiles, R]
    T,
    D,
    V,
    R,
    first,
    softcap,
    per_softcap,
    per_temperature,
    per_cap,
    stride_s,
    stride_n,
    stride_w,
    stride_dz,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, x_row, same_row = row_block(
        Rows, Count, T, stride_s, stride_n, stride_s, stride_n, BLOCK_N
    )
    v = first + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = v < V
    z, none = project(
        X, X, W, x_row, x_row, in_n, v, in_v, D, stride_w,
        False, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
    )  # fmt: skip
    z = scores(z, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
    label = tl.load(Labels + r, mask=in_n, other=-1)
    hit = tl.where((v[None, :] == label[:, None]) & in_v[None, :], 1.0, 0.0)
    d = hit - tl.exp(z - tl.load(LogSumExp + r, mask=in_n, other=0.0)[:, None])
    factor = tl.load(Factor + r, mask=in_n, other=0.0) * per_temperature
    leave(d, z, dZ, Mass, factor, n, in_n, R, stride_dz, per_cap, SOFTCAP, BLOCK_V)


@triton.jit
def tiled_live_kernel(
    Mass,  # [tiles, R]
    Total,  # [R]: mass of the slices so far
    Live,  # [row blocks]: bit i is tile i
    Count,  # []
    R,
    tiles,
    share,  # of a row's mass that a tile may hold and be left out
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < tl.load(Count)
    tile = tl.arange(0, TILES)
    in_tile = tile < tiles
    mask = in_tile[:, None] & in_n[None, :]
    at = Mass + tile.to(tl.int64)[:, None] * R + n[None, :]
    mass = tl.load(at, mask=mask, other=0.0)
    total = tl.load(Total + n, mask=in_n, other=0.0) + tl.sum(mass, 0)
    tl.store(Total + n, total, mask=in_n)
    # Turned round, so that NaN is alive.
    small = tl.where(mass <= share * total[None, :], 0, 1)
    alive = tl.where(in_tile, tl.max(small, 1), 0).to(tl.int64)
    tl.store(Live + block, tl.sum(alive << tile.to(tl.int64), 0))


@triton.jit
def bits(x):
    """How many bits of an int64 below 2^63 are set."""
    x -= (x >> 1) & 0x5555555555555555
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 127).to(tl.int32)


@triton.jit
def exponent(x):
    """log2 of a power of two."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def tiled_to_hidden_kernel(
    dZ,  # [R, slice]
    W,  # [V, D]
    Rows,  # [R]
    Count,  # []
    Live,  # [row blocks]
    dX,  # [S, T, D]
    T,
    D,
    V,
    first,
    stride_dz,
    stride_w,
    stride_xs,
    stride_xn,
    BLOCK_N: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, x_row, same_row = row_block(
        Rows, Count, T, stride_xs, stride_xn, stride_xs, stride_xn, BLOCK_N
    )
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    z_row = n.to(tl.int64) * stride_dz
    acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    PARTS: tl.constexpr = TILE_V // BLOCK_V
    # Which tile is next is computed, not read: loads that wait for loads cannot be pipelined well.
    live = tl.load(Live + tl.program_id(0))
    for i in range(0, bits(live) * PARTS):
        lowest = live & -live
        v = exponent(lowest) * TILE_V + i % PARTS * BLOCK_V + tl.arange(0, BLOCK_V)
        live = tl.where(i % PARTS == PARTS - 1, live ^ lowest, live)
        in_v = first + v < V
        dz = tl.load(dZ + z_row[:, None] + v[None, :], mask=in_n[:, None], other=0.0)
        w_row = (first + v).to(tl.int64) * stride_w
        w = tl.load(W + w_row[:, None] + d[None, :], mask=in_v[:, None] & in_d[None, :], other=0.0)
        acc = tl.dot(dz.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    at = dX + x_row[:, None] + d[None, :]
    mask = in_n[:, None] & in_d[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit
def tiled_to_weight_kernel(
    dZ,  # [R, slice]
    X,  # [S, T, D]
    Rows,  # [R]
    Count,  # []
    dW,  # [slice, D]
    dBias,  # [slice]
    T,
    D,
    V,
    first,
    stride_dz,
    stride_xs,
    stride_xn,
    stride_dw,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    count = tl.load(Count)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_v, in_d = first + v < V, d < D
    acc = tl.zeros([BLOCK_V, BLOCK_D], ACC)
    bias = tl.zeros([BLOCK_V], ACC)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < count
        r = tl.load(Rows + n, mask=in_n, other=0)
        x_row = r // T * stride_xs + r % T * stride_xn
        z_row = n.to(tl.int64) * stride_dz
        dz = tl.load(dZ + z_row[:, None] + v[None, :], mask=in_n[:, None], other=0.0)
        x = tl.load(X + x_row[:, None] + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
        if BIAS:
            bias += tl.sum(dz.to(ACC), 0)
        acc = tl.dot(
            tl.trans(dz.to(OPERAND)), x.to(OPERAND), acc,
            input_precision=PRECISION, out_dtype=ACC,
        )  # fmt: skip
    at = dW + v.to(tl.int64)[:, None] * stride_dw + d[None, :]
    mask = in_v[:, None] & in_d[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)
    if BIAS:
        if tl.program_id(1) == 0:
            tl.store(dBias + v, tl.load(dBias + v, mask=in_v, other=0.0) + bias, mask=in_v)
