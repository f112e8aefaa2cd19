"""Projection and divergence in one kernel: logits live in registers alone.

A program takes BLOCK_N rows and a range of the vocabulary (a split), and walks over it in tiles
[BLOCK_N, BLOCK_V], of which student and teacher share the tile of W. What it leaves behind, for
every row and split, is combined over the splits in `oisd_kernels.lens.tiled.op`:

    tiled_statistics_kernel    m, l, moment, top1 of one distribution, the score of the label
    tiled_kl_kernel            the same of two, and gap, for KL(a||b): one pass
    tiled_jsd_kernel           sum of the terms of the JSD, where both logsumexp are known, and
                               <q, s>, which its gradient wants

    m       the largest score                       l     sum of e^(z - m)
    moment  sum of e^(z - m) (z - m)                top1  its token
    gap     sum of e^(za - ma) ((za - ma) - (zb - mb)), so KL(a||b) = gap/la + log(lb/la)

When a maximum grows, the sums are scaled: with da, db the growth of the two,
gap -> e^-da (gap + (db - da) la). Sums over tiles are compensated (Kahan), because the KL of near
distributions is a small difference of large ones.

Letters: R rows, T tokens of a slab, D width, V vocabulary, K splits. Row r is student layer r // T
of token r % T; Rows holds the rows in the order of work, of which the first Count are wanted.
"""

import triton
import triton.language as tl

from oisd_kernels.divergences import log_probability, tanh, terms


@triton.jit
def kahan(total, lost, x):
    y = x - lost
    new = total + y
    return new, (new - total) - y


@triton.jit
def row_block(Rows, Count, T, stride_s, stride_n, stride_ts, stride_tn, BLOCK_N: tl.constexpr):
    """This program's rows: places in the order of work, wanted or not, offsets into two tensors."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < tl.load(Count)
    r = tl.load(Rows + n, mask=in_n, other=0)
    s, t = r // T, r % T
    return n, in_n, r, t, s * stride_s + t * stride_n, s * stride_ts + t * stride_tn


@triton.jit
def scores(
    z, Bias, v, in_v, softcap, per_softcap, per_temperature,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_N, BLOCK_V] from the projection -> scores; a finite lowest number past V."""
    if HAS_BIAS:
        z += tl.load(Bias + v, mask=in_v, other=0.0).to(z.dtype)[None, :]
    if SOFTCAP:
        z = softcap * tanh(z * per_softcap)
    z = z * per_temperature
    # Finite, so that differences of two such are; small enough that a tile of them can be summed.
    return tl.where(in_v[None, :] & ~(z < -1e30), z, -1e30)


@triton.jit
def project(
    Xa, Xb, W, xa_row, xb_row, in_n, v, in_v, D, stride_w,
    TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_N, BLOCK_V] of rows of Xa, and of Xb unless TWO is off."""
    za = tl.zeros([BLOCK_N, BLOCK_V], ACC)
    zb = tl.zeros([BLOCK_N, BLOCK_V], ACC)
    w_row = v.to(tl.int64) * stride_w
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        w = tl.load(W + w_row[None, :] + d[:, None], mask=in_v[None, :] & in_d[:, None], other=0.0)
        in_x = in_n[:, None] & in_d[None, :]
        xa = tl.load(Xa + xa_row[:, None] + d[None, :], mask=in_x, other=0.0)
        w = w.to(OPERAND)
        za = tl.dot(xa.to(OPERAND), w, za, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            xb = tl.load(Xb + xb_row[:, None] + d[None, :], mask=in_x, other=0.0)
            zb = tl.dot(xb.to(OPERAND), w, zb, input_precision=PRECISION, out_dtype=ACC)
    return za, zb


@triton.jit
def grow(z, m):
    """The new maxima, and by how much they grew. NaN stays in the sums, not in the maxima."""
    new = tl.maximum(m, tl.max(z, 1))
    return new, new - m


@triton.jit
def top(z, v, m, place):
    """The token of the largest score so far; the first of equals."""
    best = tl.max(z, 1)
    first = tl.min(tl.where(z == best[:, None], v[None, :], 2147483647), 1)
    return tl.where(best > m, first, place)


@triton.jit
def tiled_statistics_kernel(
    X,  # [S, T, D]
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    Labels,  # [R], by row; any others if not LABELS
    Out,  # [4, K, R]: m, l, moment, score of the label or -inf
    Top1,  # [K, R]
    T,
    D,
    V,
    R,
    span,  # of the vocabulary, a split's
    softcap,
    per_softcap,
    per_temperature,
    stride_s,
    stride_n,
    stride_w,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, x_row, same_row = row_block(  # pyright: ignore[reportGeneralTypeIssues]
        Rows, Count, T, stride_s, stride_n, stride_s, stride_n, BLOCK_N
    )
    m = tl.full([BLOCK_N], -1e30, ACC)
    l = tl.zeros([BLOCK_N], ACC)  # noqa: E741
    l_lost = tl.zeros([BLOCK_N], ACC)
    moment = tl.zeros([BLOCK_N], ACC)
    place = tl.zeros([BLOCK_N], tl.int32)
    if LABELS:
        label = tl.load(Labels + r, mask=in_n, other=-1)
        labelled = tl.full([BLOCK_N], -float("inf"), ACC)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        in_v = v < V
        z, none = project(
            X, X, W, x_row, x_row, in_n, v, in_v, D, stride_w,
            False, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        z = scores(z, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        if STATS:
            place = top(z, v, m, place)
        if LABELS:
            here = v[None, :] == label[:, None]
            labelled = tl.maximum(labelled, tl.max(tl.where(here, z, -float("inf")), 1))
        m, d = grow(z, m)
        z = z - m[:, None]
        e = tl.exp(z)
        shrink = tl.exp(-d)
        if STATS:
            moment = shrink * (moment - d * l) + tl.sum(e * z, 1)
        l, l_lost = kahan(shrink * l, shrink * l_lost, tl.sum(e, 1))  # noqa: E741
    at = Out + tl.program_id(1).to(tl.int64) * R + n
    field = tl.num_programs(1).to(tl.int64) * R
    tl.store(at, m, mask=in_n)
    tl.store(at + field, l, mask=in_n)
    if STATS:
        tl.store(at + 2 * field, moment, mask=in_n)
        tl.store(Top1 + tl.program_id(1).to(tl.int64) * R + n, place, mask=in_n)
    if LABELS:
        tl.store(at + 3 * field, labelled, mask=in_n)


@triton.jit
def tiled_kl_kernel(
    Xa,  # [S, T, D]
    Xb,  # [S, T, D]
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    Out,  # [7, K, R]: ma, la, mb, lb, gap, moment of a, moment of b
    Top1,  # [2, K, R]
    T,
    D,
    V,
    R,
    span,
    softcap,
    per_softcap,
    per_temperature,
    stride_as,
    stride_an,
    stride_bs,
    stride_bn,
    stride_w,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, a_row, b_row = row_block(  # pyright: ignore[reportGeneralTypeIssues]
        Rows, Count, T, stride_as, stride_an, stride_bs, stride_bn, BLOCK_N
    )
    ma = tl.full([BLOCK_N], -1e30, ACC)
    mb = tl.full([BLOCK_N], -1e30, ACC)
    la, la_lost = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    lb, lb_lost = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    gap, gap_lost = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    moment_a, moment_b = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    place_a, place_b = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.int32)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        in_v = v < V
        za, zb = project(
            Xa, Xb, W, a_row, b_row, in_n, v, in_v, D, stride_w,
            True, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        za = scores(za, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        zb = scores(zb, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        if STATS:
            place_a = top(za, v, ma, place_a)
            place_b = top(zb, v, mb, place_b)
        ma, da = grow(za, ma)
        mb, db = grow(zb, mb)
        za, zb = za - ma[:, None], zb - mb[:, None]
        e = tl.exp(za)
        shrink = tl.exp(-da)
        # Past V both are the lowest number, and their difference a finite one that e = 0 takes out.
        gap, gap_lost = kahan(
            shrink * (gap + (db - da) * la), shrink * gap_lost, tl.sum(e * (za - zb), 1)
        )
        if STATS:
            moment_a = shrink * (moment_a - da * la) + tl.sum(e * za, 1)
        la, la_lost = kahan(shrink * la, shrink * la_lost, tl.sum(e, 1))
        e = tl.exp(zb)
        shrink = tl.exp(-db)
        if STATS:
            moment_b = shrink * (moment_b - db * lb) + tl.sum(e * zb, 1)
        lb, lb_lost = kahan(shrink * lb, shrink * lb_lost, tl.sum(e, 1))
    at = Out + tl.program_id(1).to(tl.int64) * R + n
    field = tl.num_programs(1).to(tl.int64) * R
    tl.store(at, ma, mask=in_n)
    tl.store(at + field, la, mask=in_n)
    tl.store(at + 2 * field, mb, mask=in_n)
    tl.store(at + 3 * field, lb, mask=in_n)
    tl.store(at + 4 * field, gap, mask=in_n)
    if STATS:
        tl.store(at + 5 * field, moment_a, mask=in_n)
        tl.store(at + 6 * field, moment_b, mask=in_n)
        tops = Top1 + tl.program_id(1).to(tl.int64) * R + n
        tl.store(tops, place_a, mask=in_n)
        tl.store(tops + field, place_b, mask=in_n)


@triton.jit
def tiled_jsd_kernel(
    Xp,  # [S, T, D]: teacher
    Xq,  # [S, T, D]: student
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    LseP,  # [T]
    LseQ,  # [R], by row
    Out,  # [2, K, R]: sum of the terms, <q, s>
    T,
    D,
    V,
    R,
    span,
    softcap,
    per_softcap,
    per_temperature,
    stride_ps,
    stride_pn,
    stride_qs,
    stride_qn,
    stride_w,
    BETA: tl.constexpr,
    LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, p_row, q_row = row_block(  # pyright: ignore[reportGeneralTypeIssues]
        Rows, Count, T, stride_ps, stride_pn, stride_qs, stride_qn, BLOCK_N
    )
    lse_p = tl.load(LseP + t, mask=in_n, other=0.0)
    lse_q = tl.load(LseQ + r, mask=in_n, other=0.0)
    loss, lost = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    centre, centre_lost = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        in_v = v < V
        zp, zq = project(
            Xp, Xq, W, p_row, q_row, in_n, v, in_v, D, stride_w,
            True, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        zp = scores(zp, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        zq = scores(zq, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        lp = log_probability(zp, lse_p[:, None])
        lq = log_probability(zq, lse_q[:, None])
        # Past V both probabilities are 0, and so are the terms.
        term, inner, q = terms(lp, lq, "jsd", BETA, LOG_BETA, LOG_1M_BETA)
        loss, lost = kahan(loss, lost, tl.sum(term, 1))
        if GRADIENT:
            centre, centre_lost = kahan(centre, centre_lost, tl.sum(q * inner, 1))
    at = Out + tl.program_id(1).to(tl.int64) * R + n
    tl.store(at, loss, mask=in_n)
    if GRADIENT:
        tl.store(at + tl.num_programs(1).to(tl.int64) * R, centre, mask=in_n)
