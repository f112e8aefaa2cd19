"""Gradients of the tiled losses, one slice of the vocabulary at a time.

    tiled_lens_gradient_kernel     recomputes both logits; dZ of the student's
    tiled_logprob_gradient_kernel  recomputes logits; dZ of the label's log-probability
    tiled_live_kernel              which tiles of dZ are worth a matmul
    tiled_to_hidden_kernel         dX[r] += sum_v dZ[r, v] W[v], over the live tiles
    tiled_to_weight_kernel         dW[v] += sum_r dZ[r, v] X[r] and dBias[v] += sum_r dZ[r, v]

The first two project as the value kernels do. They store dZ [R, slice], the gradient to the raw
logits, and Mass, the sum_v |dZ / factor| of each row and tile. `oisd_kernels.lens.tiled.gradient`
explains why dZ is stored at all and which tiles are left out.

With the names of `oisd_kernels.divergences`, before factor and the softcap's derivative:

    jsd, reverse_kl    dz = q * (<q, inner> - inner)        Centre = <q, inner>
    forward_kl         dz = q - p
    logprob            dz = [v is the label] - e^(z - logsumexp)

Names and letters as in `oisd_kernels.lens.tiled.kernels`; `first` is the slice's first token. dZ,
Mass and Live are in the order of work, everything else by row.
"""

# pyright: reportGeneralTypeIssues=false
# (pyright believes that a jitted function returns None, which cannot be unpacked)

import triton
import triton.language as tl

from oisd_kernels.divergences import log_probability, terms
from oisd_kernels.lens.tiled.kernels import project, row_block, scores


@triton.jit
def store_gradient(
    dz, z, dZ, Mass, factor, n, in_n, R, stride_dz, per_cap,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Stores factor * dz, the gradient to scores z, as one to raw logits; its mass without factor.

    dz and z [BLOCK_N, BLOCK_V], factor [BLOCK_N].
    """
    if SOFTCAP:
        # tanh, from the score itself. Past V, z = -1e30 lies far outside the cap.
        tanh_z = tl.minimum(tl.abs(z * per_cap), 1.0)
        dz *= 1 - tanh_z * tanh_z
    tile = tl.program_id(1)
    # Without factor, which is constant in a row: tiles are compared with the row's total.
    tl.store(Mass + tile.to(tl.int64) * R + n, tl.sum(tl.abs(dz), 1), mask=in_n)
    dz *= factor[:, None]
    o_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    # [BLOCK_N, BLOCK_V]; int64, since R times the slice may exceed 2^31
    p_dz = dZ + n.to(tl.int64)[:, None] * stride_dz + o_v[None, :]
    tl.store(p_dz, dz.to(dZ.dtype.element_ty), mask=in_n[:, None])


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
    T, D, V, R, first, softcap, per_softcap, per_temperature,
    per_cap,  # 1 over the cap of the scores: softcap / temperature
    stride_ps, stride_pn, stride_qs, stride_qn, stride_w, stride_dz,
    DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, o_p, o_q = row_block(
        Rows, Count, T, stride_ps, stride_pn, stride_qs, stride_qn, BLOCK_N
    )
    # [BLOCK_V]
    v = first + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = v < V
    # [BLOCK_N, BLOCK_V] each, like all that follows up to dz
    zp, zq = project(
        Xp, Xq, W, o_p, o_q, in_n, v, in_v, D, stride_w,
        True, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
    )  # fmt: skip
    zp = scores(zp, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
    zq = scores(zq, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
    lp = log_probability(zp, tl.load(LseP + t, mask=in_n, other=0.0)[:, None])
    lq = log_probability(zq, tl.load(LseQ + r, mask=in_n, other=0.0)[:, None])
    term, inner, q = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
    # [BLOCK_N]
    factor = tl.load(Factor + r, mask=in_n, other=0.0) * per_temperature
    if DIVERGENCE == "forward_kl":
        dz = q - inner
    else:
        dz = q * (tl.load(Centre + r, mask=in_n, other=0.0)[:, None] - inner)
    if DIVERGENCE == "jsd":
        factor *= 1 - BETA
    store_gradient(dz, zq, dZ, Mass, factor, n, in_n, R, stride_dz, per_cap, SOFTCAP, BLOCK_V)


@triton.jit
def tiled_logprob_gradient_kernel(
    X,  # [1, T, D]
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    Labels,  # [R]
    LogSumExp,  # [R]
    Rest,  # [R]: 1 - p of the label, which 1 - exp(z - logsumexp) has no digits of near p = 1
    Factor,  # [R]
    dZ,  # [R, slice]
    Mass,  # [tiles, R]
    T, D, V, R, first, softcap, per_softcap, per_temperature, per_cap,
    stride_s, stride_n, stride_w, stride_dz,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, o_x, o_same = row_block(
        Rows, Count, T, stride_s, stride_n, stride_s, stride_n, BLOCK_N
    )
    # [BLOCK_V]
    v = first + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = v < V
    # [BLOCK_N, BLOCK_V], like is_label and dz
    z, unused = project(
        X, X, W, o_x, o_x, in_n, v, in_v, D, stride_w,
        False, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
    )  # fmt: skip
    z = scores(z, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
    # [BLOCK_N]
    label = tl.load(Labels + r, mask=in_n, other=-1)
    is_label = (v[None, :] == label[:, None]) & in_v[None, :]
    rest = tl.load(Rest + r, mask=in_n, other=0.0)
    dz = -tl.exp(z - tl.load(LogSumExp + r, mask=in_n, other=0.0)[:, None])
    dz = tl.where(is_label, rest[:, None], dz)
    # [BLOCK_N]
    factor = tl.load(Factor + r, mask=in_n, other=0.0) * per_temperature
    store_gradient(dz, z, dZ, Mass, factor, n, in_n, R, stride_dz, per_cap, SOFTCAP, BLOCK_V)


@triton.jit
def tiled_live_kernel(
    Mass,  # [tiles, R]
    Total,  # [R]: mass of the slices so far
    Live,  # [row blocks]: bit i is tile i
    Count,  # []
    R, tiles,
    share,  # a tile is left out if it holds at most this share of each row's mass
    TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < tl.load(Count)
    tile = tl.arange(0, TILES)
    in_tile = tile < tiles
    # [TILES, BLOCK_N]
    in_mass = in_tile[:, None] & in_n[None, :]
    p_mass = Mass + tile.to(tl.int64)[:, None] * R + n[None, :]
    # [TILES, BLOCK_N]
    mass = tl.load(p_mass, mask=in_mass, other=0.0)
    # [BLOCK_N]
    total = tl.load(Total + n, mask=in_n, other=0.0) + tl.sum(mass, 0)
    tl.store(Total + n, total, mask=in_n)
    # Written as "not <=", so that a tile with NaN counts as live.
    above_share = tl.where(mass <= share * total[None, :], 0, 1)
    # [TILES]
    is_live = tl.where(in_tile, tl.max(above_share, 1), 0).to(tl.int64)
    tl.store(Live + block, tl.sum(is_live << tile.to(tl.int64), 0))


@triton.jit
def popcount(x):
    """How many bits of an int64 below 2^63 are set."""
    x -= (x >> 1) & 0x5555555555555555
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 127).to(tl.int32)


@triton.jit
def log2_of_power(x):
    """log2 of a power of two: the exponent field of the float32."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def tiled_to_hidden_kernel(
    dZ,  # [R, slice]
    W,  # [V, D]
    Rows,  # [R]
    Count,  # []
    Live,  # [row blocks]
    dX,  # [S, T, D]
    T, D, V, first,
    stride_dz, stride_w, stride_xs, stride_xn,
    BLOCK_N: tl.constexpr, TILE_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, o_x, o_same = row_block(
        Rows, Count, T, stride_xs, stride_xn, stride_xs, stride_xn, BLOCK_N
    )
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    # [BLOCK_N]
    o_z = n.to(tl.int64) * stride_dz
    acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    PARTS: tl.constexpr = TILE_V // BLOCK_V
    # The next live tile is computed from the bits, not read from a list: loads that wait for loads
    # cannot be pipelined well. A tile of dZ is TILE_V wide, a step takes BLOCK_V of it.
    live = tl.load(Live + tl.program_id(0))
    for step in range(0, popcount(live) * PARTS):
        lowest_bit = live & -live
        # [BLOCK_V]: tokens within the slice
        v = log2_of_power(lowest_bit) * TILE_V + step % PARTS * BLOCK_V + tl.arange(0, BLOCK_V)
        # After a tile's last part, its bit is cleared.
        live = tl.where(step % PARTS == PARTS - 1, live ^ lowest_bit, live)
        in_v = first + v < V
        # [BLOCK_N, BLOCK_V]
        dz = tl.load(dZ + o_z[:, None] + v[None, :], mask=in_n[:, None], other=0.0)
        o_w = (first + v).to(tl.int64) * stride_w
        # [BLOCK_V, BLOCK_D]
        w = tl.load(W + o_w[:, None] + d[None, :], mask=in_v[:, None] & in_d[None, :], other=0.0)
        acc = tl.dot(dz.to(OPERAND), w.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    # [BLOCK_N, BLOCK_D]. Every slice adds to it: one program a tile, so without atomics.
    p_dx = dX + o_x[:, None] + d[None, :]
    in_dx = in_n[:, None] & in_d[None, :]
    tl.store(p_dx, tl.load(p_dx, mask=in_dx, other=0.0) + acc, mask=in_dx)


@triton.jit
def tiled_to_weight_kernel(
    dZ,  # [R, slice]
    X,  # [S, T, D]
    Rows,  # [R]
    Count,  # []
    dW,  # [slice, D]
    dBias,  # [slice]
    T, D, V, first,
    stride_dz, stride_xs, stride_xn, stride_dw,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.load(Count)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_v, in_d = first + v < V, d < D
    acc = tl.zeros([BLOCK_V, BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_V], ACC)
    for n_start in range(0, count, BLOCK_N):
        n = n_start + tl.arange(0, BLOCK_N)
        in_n = n < count
        r = tl.load(Rows + n, mask=in_n, other=0)
        o_x = r // T * stride_xs + r % T * stride_xn
        o_z = n.to(tl.int64) * stride_dz
        # [BLOCK_N, BLOCK_V]
        dz = tl.load(dZ + o_z[:, None] + v[None, :], mask=in_n[:, None], other=0.0)
        # [BLOCK_N, BLOCK_D]
        x = tl.load(X + o_x[:, None] + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
        if BIAS:
            # [BLOCK_V]
            dbias += tl.sum(dz.to(ACC), 0)
        acc = tl.dot(
            tl.trans(dz.to(OPERAND)), x.to(OPERAND), acc,
            input_precision=PRECISION, out_dtype=ACC,
        )  # fmt: skip
    # [BLOCK_V, BLOCK_D]
    p_dw = dW + v.to(tl.int64)[:, None] * stride_dw + d[None, :]
    in_dw = in_v[:, None] & in_d[None, :]
    tl.store(p_dw, tl.load(p_dw, mask=in_dw, other=0.0) + acc, mask=in_dw)
    if BIAS:
        if tl.program_id(1) == 0:
            tl.store(dBias + v, tl.load(dBias + v, mask=in_v, other=0.0) + dbias, mask=in_v)
