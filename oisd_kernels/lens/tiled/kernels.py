"""Projection and divergence in one kernel: logits stay in registers.

A program takes BLOCK_N rows and a part of the vocabulary (a split), and loops over it in tiles
[BLOCK_N, BLOCK_V]. Student and teacher share each tile of W. `oisd_kernels.lens.tiled.values`
combines the splits' results:

    tiled_statistics_kernel    m, l, moment and top1 of one distribution; with labels the label's
                               score, and l and moment without the label, whose 1 - p would have no
                               digits left beside p
    tiled_kl_kernel            m, l, moment and top1 of two distributions a and b, and kl_sum, for
                               KL(a||b): one pass
    tiled_jsd_kernel           sum of the JSD's terms, given both logsumexps, and <q, s>, which its
                               gradient needs (`oisd_kernels.divergences`)

    m       the largest score                       l     sum of e^(z - m)
    moment  sum of e^(z - m) (z - m)                top1  the token of the largest score
    kl_sum  sum of e^(za - ma) ((za - ma) - (zb - mb)), so KL(a||b) = kl_sum/la + log(lb/la)

If a tile raises the maxima by da and db, what was summed before is brought to the new maxima:

    l -> e^-da l    moment -> e^-da (moment - da l)    kl_sum -> e^-da (kl_sum + (db - da) la)

These use the old l, so moment and kl_sum are updated before l. All sums but the moments are
compensated (Kahan), because the KL of close distributions is a small difference of large numbers.

Letters: R rows, T tokens per student layer, D width, V vocabulary, K splits. Row r is token r % T
of student layer r // T; Rows lists the rows in the order of work, the first Count of them wanted.
Names: n place in that order, d column of X and W, v token of the vocabulary, in_n, in_d, in_v their
masks; o_ offset, p_ block of pointers; z scores.
"""

import triton
import triton.language as tl

from oisd_kernels.divergences import log_probability, tanh, terms


@triton.jit
def kahan(total, compensation, x):
    """total + x, and the rounding error to take off the next x. Must not be reordered."""
    y = x - compensation
    new = total + y
    return new, (new - total) - y


@triton.jit
def row_block(Rows, Count, T, stride_s, stride_n, stride_ts, stride_tn, BLOCK_N: tl.constexpr):
    """This program's rows, [BLOCK_N] each: n, in_n, r, token, offsets into two [S, T, D]."""
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
    """Scores of raw logits z [BLOCK_N, BLOCK_V]; -1e30 from V on and instead of -inf."""
    if HAS_BIAS:
        z += tl.load(Bias + v, mask=in_v, other=0.0).to(z.dtype)[None, :]
    if SOFTCAP:
        z = softcap * tanh(z * per_softcap)
    z = z * per_temperature
    # Finite, so that the difference of two is; small enough that a tile of them can be summed.
    # `~(z < ...)` and not `z >= ...`, so that NaN stays NaN.
    return tl.where(in_v[None, :] & ~(z < -1e30), z, -1e30)


@triton.jit
def project(
    Xa, Xb, W, o_xa, o_xb, in_n, v, in_v, D, stride_w,
    TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw logits [BLOCK_N, BLOCK_V] of rows of Xa and, with TWO, of Xb (else 0)."""
    za = tl.zeros([BLOCK_N, BLOCK_V], ACC)
    zb = tl.zeros([BLOCK_N, BLOCK_V], ACC)
    o_w = v.to(tl.int64) * stride_w
    for d_start in range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        in_d = d < D
        # [BLOCK_D, BLOCK_V]: W transposed by its addresses
        w = tl.load(W + o_w[None, :] + d[:, None], mask=in_v[None, :] & in_d[:, None], other=0.0)
        # [BLOCK_N, BLOCK_D]
        in_x = in_n[:, None] & in_d[None, :]
        xa = tl.load(Xa + o_xa[:, None] + d[None, :], mask=in_x, other=0.0)
        # Converted once for both products.
        w = w.to(OPERAND)
        za = tl.dot(xa.to(OPERAND), w, za, input_precision=PRECISION, out_dtype=ACC)
        if TWO:
            xb = tl.load(Xb + o_xb[:, None] + d[None, :], mask=in_x, other=0.0)
            zb = tl.dot(xb.to(OPERAND), w, zb, input_precision=PRECISION, out_dtype=ACC)
    return za, zb


@triton.jit
def update_maximum(z, m):
    """The new maxima [BLOCK_N], and their growth. NaN shows in the sums, not in the maxima."""
    m_new = tl.maximum(m, tl.max(z, 1))
    return m_new, m_new - m


@triton.jit
def update_argmax(z, v, m, top1):
    """The token of the largest score so far [BLOCK_N], the first of equals; m before this tile."""
    z_max = tl.max(z, 1)
    first = tl.min(tl.where(z == z_max[:, None], v[None, :], 2147483647), 1)
    return tl.where(z_max > m, first, top1)


@triton.jit
def tiled_statistics_kernel(
    X,  # [S, T, D]
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    Labels,  # [R], by row; not read without LABELS
    Out,  # [4, K, R]: m, l, moment, label's score (-inf if in another split)
    Top1,  # [K, R]
    T, D, V, R,
    span,  # tokens of the vocabulary in a split
    softcap, per_softcap, per_temperature,
    stride_s, stride_n, stride_w,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, LABELS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, o_x, o_same = row_block(  # pyright: ignore[reportGeneralTypeIssues]
        Rows, Count, T, stride_s, stride_n, stride_s, stride_n, BLOCK_N
    )
    # Sums of the rows, [BLOCK_N]
    m = tl.full([BLOCK_N], -1e30, ACC)
    l = tl.zeros([BLOCK_N], ACC)  # noqa: E741
    l_comp = tl.zeros([BLOCK_N], ACC)
    moment = tl.zeros([BLOCK_N], ACC)
    top1 = tl.zeros([BLOCK_N], tl.int32)
    if LABELS:
        # [BLOCK_N]
        label = tl.load(Labels + r, mask=in_n, other=-1)
        label_score = tl.full([BLOCK_N], -float("inf"), ACC)
    v_begin = tl.program_id(1) * span
    for v_start in range(v_begin, tl.minimum(v_begin + span, V), BLOCK_V):
        v = v_start + tl.arange(0, BLOCK_V)
        in_v = v < V
        # [BLOCK_N, BLOCK_V]
        z, unused = project(
            X, X, W, o_x, o_x, in_n, v, in_v, D, stride_w,
            False, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        z = scores(z, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        if STATS:
            # Before m is updated, since it compares with the maximum so far.
            top1 = update_argmax(z, v, m, top1)
        if LABELS:
            is_label = v[None, :] == label[:, None]
            label_score = tl.maximum(label_score, tl.max(tl.where(is_label, z, -float("inf")), 1))
        m, growth = update_maximum(z, m)
        z = z - m[:, None]
        # [BLOCK_N, BLOCK_V]
        e = tl.exp(z)
        if LABELS:
            e = tl.where(is_label, 0.0, e)
        # [BLOCK_N]
        rescale = tl.exp(-growth)
        if STATS:
            # With the old l, so before l is updated.
            moment = rescale * (moment - growth * l) + tl.sum(e * z, 1)
        l, l_comp = kahan(rescale * l, rescale * l_comp, tl.sum(e, 1))  # noqa: E741
    # [BLOCK_N]; field f is stride_field * f further on
    p_out = Out + tl.program_id(1).to(tl.int64) * R + n
    stride_field = tl.num_programs(1).to(tl.int64) * R
    tl.store(p_out, m, mask=in_n)
    tl.store(p_out + stride_field, l, mask=in_n)
    if STATS:
        tl.store(p_out + 2 * stride_field, moment, mask=in_n)
        tl.store(Top1 + tl.program_id(1).to(tl.int64) * R + n, top1, mask=in_n)
    if LABELS:
        tl.store(p_out + 3 * stride_field, label_score, mask=in_n)


@triton.jit
def tiled_kl_kernel(
    Xa,  # [S, T, D]
    Xb,  # [S, T, D]
    W,  # [V, D]
    Bias,  # [V]
    Rows,  # [R]
    Count,  # []
    Out,  # [7, K, R]: ma, la, mb, lb, kl_sum, moment of a, moment of b
    Top1,  # [2, K, R]
    T, D, V, R, span, softcap, per_softcap, per_temperature,
    stride_as, stride_an, stride_bs, stride_bn, stride_w,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, o_a, o_b = row_block(  # pyright: ignore[reportGeneralTypeIssues]
        Rows, Count, T, stride_as, stride_an, stride_bs, stride_bn, BLOCK_N
    )
    # Sums of the rows, [BLOCK_N]
    ma = tl.full([BLOCK_N], -1e30, ACC)
    mb = tl.full([BLOCK_N], -1e30, ACC)
    la, la_comp = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    lb, lb_comp = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    kl_sum, kl_comp = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    moment_a, moment_b = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    top1_a, top1_b = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.int32)
    v_begin = tl.program_id(1) * span
    for v_start in range(v_begin, tl.minimum(v_begin + span, V), BLOCK_V):
        v = v_start + tl.arange(0, BLOCK_V)
        in_v = v < V
        # [BLOCK_N, BLOCK_V] each
        za, zb = project(
            Xa, Xb, W, o_a, o_b, in_n, v, in_v, D, stride_w,
            True, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        za = scores(za, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        zb = scores(zb, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        if STATS:
            # Before ma and mb are updated, since it compares with the maxima so far.
            top1_a = update_argmax(za, v, ma, top1_a)
            top1_b = update_argmax(zb, v, mb, top1_b)
        ma, da = update_maximum(za, ma)
        mb, db = update_maximum(zb, mb)
        # [BLOCK_N, BLOCK_V] each
        za, zb = za - ma[:, None], zb - mb[:, None]
        e = tl.exp(za)
        rescale = tl.exp(-da)
        # With the old la, so before la is updated. Past V, za - zb is finite and e = 0.
        kl_sum, kl_comp = kahan(
            rescale * (kl_sum + (db - da) * la), rescale * kl_comp, tl.sum(e * (za - zb), 1)
        )
        if STATS:
            moment_a = rescale * (moment_a - da * la) + tl.sum(e * za, 1)
        la, la_comp = kahan(rescale * la, rescale * la_comp, tl.sum(e, 1))
        # After a's sums, so that one tile of exponentials is needed at a time.
        e = tl.exp(zb)
        rescale = tl.exp(-db)
        if STATS:
            moment_b = rescale * (moment_b - db * lb) + tl.sum(e * zb, 1)
        lb, lb_comp = kahan(rescale * lb, rescale * lb_comp, tl.sum(e, 1))
    # [BLOCK_N]; field f is stride_field * f further on
    p_out = Out + tl.program_id(1).to(tl.int64) * R + n
    stride_field = tl.num_programs(1).to(tl.int64) * R
    tl.store(p_out, ma, mask=in_n)
    tl.store(p_out + stride_field, la, mask=in_n)
    tl.store(p_out + 2 * stride_field, mb, mask=in_n)
    tl.store(p_out + 3 * stride_field, lb, mask=in_n)
    tl.store(p_out + 4 * stride_field, kl_sum, mask=in_n)
    if STATS:
        tl.store(p_out + 5 * stride_field, moment_a, mask=in_n)
        tl.store(p_out + 6 * stride_field, moment_b, mask=in_n)
        p_top1 = Top1 + tl.program_id(1).to(tl.int64) * R + n
        tl.store(p_top1, top1_a, mask=in_n)
        tl.store(p_top1 + stride_field, top1_b, mask=in_n)


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
    T, D, V, R, span, softcap, per_softcap, per_temperature,
    stride_ps, stride_pn, stride_qs, stride_qn, stride_w,
    BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) * BLOCK_N >= tl.load(Count):
        return
    n, in_n, r, t, o_p, o_q = row_block(  # pyright: ignore[reportGeneralTypeIssues]
        Rows, Count, T, stride_ps, stride_pn, stride_qs, stride_qn, BLOCK_N
    )
    # [BLOCK_N] each
    lse_p = tl.load(LseP + t, mask=in_n, other=0.0)
    lse_q = tl.load(LseQ + r, mask=in_n, other=0.0)
    # Sums of the rows, [BLOCK_N]
    loss, loss_comp = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    centre, centre_comp = tl.zeros([BLOCK_N], ACC), tl.zeros([BLOCK_N], ACC)
    v_begin = tl.program_id(1) * span
    for v_start in range(v_begin, tl.minimum(v_begin + span, V), BLOCK_V):
        v = v_start + tl.arange(0, BLOCK_V)
        in_v = v < V
        # [BLOCK_N, BLOCK_V] each
        zp, zq = project(
            Xp, Xq, W, o_p, o_q, in_n, v, in_v, D, stride_w,
            True, BLOCK_N, BLOCK_V, BLOCK_D, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        zp = scores(zp, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        zq = scores(zq, Bias, v, in_v, softcap, per_softcap, per_temperature, HAS_BIAS, SOFTCAP)
        # [BLOCK_N, BLOCK_V] each
        lp = log_probability(zp, lse_p[:, None])
        lq = log_probability(zq, lse_q[:, None])
        # Past V both probabilities are 0, and so is term.
        term, inner, q = terms(lp, lq, "jsd", BETA, LOG_BETA, LOG_1M_BETA)
        loss, loss_comp = kahan(loss, loss_comp, tl.sum(term, 1))
        if GRADIENT:
            centre, centre_comp = kahan(centre, centre_comp, tl.sum(q * inner, 1))
    # [BLOCK_N]
    p_out = Out + tl.program_id(1).to(tl.int64) * R + n
    tl.store(p_out, loss, mask=in_n)
    if GRADIENT:
        tl.store(p_out + tl.num_programs(1).to(tl.int64) * R, centre, mask=in_n)
