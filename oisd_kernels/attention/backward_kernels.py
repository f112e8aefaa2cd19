"""Gradient of attention and of the divergence of two attention maps, recomputing P once for both.

    attention_dq_kernel     a program takes BLOCK_M queries and loops over their keys
    attention_dkdv_kernel   a program takes BLOCK_N keys of one key head and loops over the queries
                            that see them, in all query heads of the group: no atomics, so
                            deterministic

P is the student's map, T the teacher's, D = log T/P, g the row's weight and a its statistic:

    dS = P * (dP - delta)                     PLAIN: dP = dO V^T, delta = rowsum(dO * O) - dLse
       + P * (-(1-beta) * g) * (s - a)        ALIGN, jsd: s = softplus(D + log(beta/(1-beta))),
                                              a = <P, s>
       + P * -g * (D + a)                     ALIGN, reverse_kl: a = -<P, D>
       + P * g - T * g                        ALIGN, forward_kl
    dQ = scale * dS K,  dK = scale * dS^T Q,  dV = P^T dO

A softcap multiplies dS by 1 - tanh^2. The launcher reduces what is constant in a row to two
numbers, `factor` and `shift`, because registers limit a tile's size:

    dS = P * (dP + factor * inner - shift)                      jsd, reverse_kl
    dS = P * (dP - shift) + factor * T                          forward_kl

In the code, ds_over_p is the bracket, teacher_term is factor * T, and lq, lp are log2 P, log2 T. dK
and dV use transposed scores, K Q^T, so that P^T and dS^T are left operands and stay in registers.
With SCALE_DS, dS is multiplied by a power of two before it is rounded to a narrow operand dtype.

Rows with factor 0 take no part in ALIGN, whatever they hold; the others are "kept". SPLIT gives
full blocks a loop of their own, without masks, in plain launches. A second loop costs registers;
with the alignment, whose elementwise work is several times a mask's, it gains little. TILES says
which tiles a launch works on: "all"; or, for PLAIN and ALIGN together, "live" (tiles with a kept
row) and "dead" (the others). The two launches share the output, and the second reads no teacher.
Names and letters are those of `oisd_kernels.attention.kernels`.
"""

# pyright: reportGeneralTypeIssues=false
# (pyright believes that a jitted function returns None, which cannot be unpacked)

import triton
import triton.language as tl

from oisd_kernels.attention.kernels import (
    LN2,
    LOG2E,
    blocks_of,
    head_at,
    keys_of,
    load_rows,
    product,
    scores,
    store_rows,
    tile_at,
    visible,
)
from oisd_kernels.divergences import inner


@triton.jit
def alignment(
    ds_over_p, teacher_term, zt, lq, lse_t, factor,
    PLAIN: tl.constexpr, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr, SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Adds the alignment to ds_over_p and teacher_term; zt, lq, lse_t, factor broadcast to p."""
    st, _ = scores(zt, SCALE_T, SOFTCAP, LOG2E)
    # log2 T, [BLOCK_M, BLOCK_N] or transposed
    lp = st - lse_t
    if DIVERGENCE == "forward_kl":
        teacher_term = factor * tl.exp2(lp)
        if PLAIN:
            # Without the test, a row of weight 0 whose teacher holds NaN would give 0 * NaN.
            teacher_term = tl.where(factor != 0, teacher_term, 0.0)
    else:
        weighted_inner = factor * inner((lp - lq) * LN2, DIVERGENCE, LOG_ODDS)
        if PLAIN:  # without PLAIN, d_scores clears all of dS where the factor is 0
            weighted_inner = tl.where(factor != 0, weighted_inner, 0.0)
        ds_over_p += weighted_inner
    return ds_over_p, teacher_term


@triton.jit
def d_scores(
    p, ds_over_p, teacher_term, tanh_z, factor,
    PLAIN: tl.constexpr, ALIGN: tl.constexpr, DIVERGENCE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dS = P * ds_over_p + teacher_term, through the softcap; the shape of p."""
    ds = p * ds_over_p
    if ALIGN:
        if DIVERGENCE == "forward_kl":
            ds += teacher_term
        if not PLAIN:
            ds = tl.where(factor != 0, ds, 0.0)
    if SOFTCAP is not None:
        ds = ds * (1 - tanh_z * tanh_z)
    return ds


@triton.jit
def dq_block(
    acc, q, qt, d_out, lse, lse_t, factor, shift, i, in_i, j, in_j, end, window, ds_scale, Q, dOut,
    Qt, stride_qn, stride_don, stride_qtn, K, V, Kt, stride_kn, stride_vn, stride_ktn,
    DEPTH: tl.constexpr, PLAIN: tl.constexpr, ALIGN: tl.constexpr, DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS K of a block of keys to acc [BLOCK_M, BLOCK_K]; K, V, Kt point to its first key.

    Keys outside in_j are not read: no row sees them.
    """
    # [BLOCK_N, BLOCK_K]
    k = load_rows(K, in_j, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
    zero = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    # [BLOCK_M, BLOCK_N], as all up to ds
    z = product(
        q, k, zero, Q, in_i, stride_qn, K, in_j, stride_kn,
        HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    s, tanh_z = scores(z, SCALE, SOFTCAP, LOG2E)
    lq = s - lse[:, None]
    p = tl.exp2(lq)
    # dP's accumulator starts from the other terms of the bracket: no second tile beside it.
    ds_over_p = tl.broadcast_to(-shift[:, None], p.shape)
    teacher_term = 0.0
    if ALIGN:
        # [BLOCK_N, BLOCK_KT]
        kt = load_rows(Kt, in_j, stride_ktn, HEAD_DIM_T, BLOCK_N, BLOCK_KT, MASKED, OPERAND)
        zt = product(
            qt, kt, zero, Qt, in_i, stride_qtn, Kt, in_j, stride_ktn,
            HEAD_DIM_T, BLOCK_KT, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
        ds_over_p, teacher_term = alignment(
            ds_over_p, teacher_term, zt, lq, lse_t[:, None], factor[:, None],
            PLAIN, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP,
        )  # fmt: skip
    if PLAIN:
        # [BLOCK_N, BLOCK_K]
        v = load_rows(V, in_j, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
        ds_over_p = product(
            d_out, v, ds_over_p, dOut, in_i, stride_don, V, in_j, stride_vn,
            HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
    ds = d_scores(
        p, ds_over_p, teacher_term, tanh_z, factor[:, None], PLAIN, ALIGN, DIVERGENCE, SOFTCAP
    )
    if MASKED:
        mask = visible(i[:, None], j[None, :], end, window, CAUSAL, WINDOW)
        ds = tl.where(mask, ds, 0.0)
    # Scaled before it is rounded; the caller undoes the scale.
    ds = (ds * ds_scale).to(OPERAND)
    return tl.dot(ds, k, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def seen_by_kept(j, in_j, i_begin, i_end, window, Kept, CAUSAL: tl.constexpr):
    """Which of the keys j [BLOCK_N] some kept row of [i_begin, i_end) sees through its window.

    A key's rows are an interval; it holds a kept one if the prefix count Kept grows over it.
    """
    first_row = j if CAUSAL else j - window + 1
    kept_before = tl.load(Kept + tl.maximum(first_row, i_begin), mask=in_j, other=0)
    return tl.load(Kept + tl.minimum(j + window, i_end), mask=in_j, other=0) > kept_before


@triton.jit
def attention_dq_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    V,  # [N, J, K]
    dOut,  # [N, H, K]
    Qt,  # [N, H, Kt]: teacher
    Kt,  # [N, Jt, Kt]
    Lse,  # [H, N], base 2, finite where a row has no key
    LseT,  # [H, N], the same of the teacher
    Factor,  # [N]
    Shift,  # [H, N]
    DsScale,  # [2]: a power of two that brings dS into the operand's range, and its inverse
    dQ,  # [N, H, K]
    Tiles,  # [3, P]
    Kept,  # [N + 1]: how many of the rows before this one are kept
    tokens, group, group_t, window,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_don, stride_doh,
    stride_qtn, stride_qth, stride_ktn, stride_kth, stride_dqn, stride_dqh,
    PLAIN: tl.constexpr, ALIGN: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr, SCALE_DS: tl.constexpr, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr,
    SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    # Under a causal mask the last tiles see the most keys, so they start first.
    begin, end, start = tile_at(Tiles, programs - 1 - tl.program_id(0), programs)
    if start >= end:
        return
    h = tl.program_id(1)
    # [BLOCK_M]: queries; kept: those with factor other than 0
    i = start + tl.arange(0, BLOCK_M)
    in_i = i < end
    kept = in_i
    i_begin, i_end = start, tl.minimum(start + BLOCK_M, end)
    if ALIGN or TILES == "dead":
        kept = tl.load(Factor + i, mask=in_i, other=0.0) != 0
        live = tl.max(kept.to(tl.int32), 0) > 0
        if TILES != "all":
            if live == (TILES == "dead"):
                return
    if not PLAIN:
        # Keys that no kept row sees are not read: they may hold NaN, and 0 * NaN is NaN.
        i_begin = tl.min(tl.where(kept, i, end), 0)
        i_end = tl.max(tl.where(kept, i + 1, begin), 0)
    acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    if i_begin < i_end:
        o_head = h.to(tl.int64) * tokens
        o_n = tl.arange(0, BLOCK_N)
        Q = head_at(Q, start, h, stride_qn, stride_qh)
        dOut = head_at(dOut, start, h, stride_don, stride_doh)
        Qt = head_at(Qt, start, h, stride_qtn, stride_qth)
        # [BLOCK_M, BLOCK_K]
        q = load_rows(Q, in_i, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
        # [BLOCK_M] each
        lse = tl.load(Lse + o_head + i, mask=in_i, other=0.0)
        shift = tl.load(Shift + o_head + i, mask=in_i, other=0.0)
        d_out, qt, lse_t, factor, ds_scale = q, q, lse, lse, 1.0  # placeholders where not used
        if PLAIN:
            # [BLOCK_M, BLOCK_K]
            d_out = load_rows(dOut, in_i, stride_don, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
        if ALIGN:
            # [BLOCK_M, BLOCK_KT]
            qt = load_rows(Qt, in_i, stride_qtn, HEAD_DIM_T, BLOCK_M, BLOCK_KT, True, OPERAND)
            # [BLOCK_M] each
            lse_t = tl.load(LseT + o_head + i, mask=in_i, other=0.0)
            factor = tl.load(Factor + i, mask=in_i, other=0.0)
        if SCALE_DS:
            ds_scale = tl.load(DsScale)
        lo, hi, full_lo, full_hi = keys_of(begin, end, i_begin, i_end, window, CAUSAL, WINDOW)
        blocks, full_begin, full_end = blocks_of(lo, hi, full_lo, full_hi, BLOCK_N)
        if SPLIT:
            # Full blocks, without a mask
            for block in range(full_begin, full_end):
                j_start = lo + block * BLOCK_N
                j = j_start + o_n
                acc = dq_block(
                    acc, q, qt, d_out, lse, lse_t, factor, shift, i, in_i, j, j < hi, end,
                    window, ds_scale, Q, dOut, Qt, stride_qn, stride_don, stride_qtn,
                    head_at(K, j_start, h // group, stride_kn, stride_kh),
                    head_at(V, j_start, h // group, stride_vn, stride_vh),
                    head_at(Kt, j_start, h // group_t, stride_ktn, stride_kth),
                    stride_kn, stride_vn, stride_ktn, DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS,
                    SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N,
                    BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, False,
                )  # fmt: skip
            blocks -= full_end - full_begin
        # The other blocks, or all without SPLIT, masked
        for block in range(0, blocks):
            j_start = lo + block * BLOCK_N
            if SPLIT:
                j_start = (
                    lo
                    + tl.where(block < full_begin, block, block + full_end - full_begin) * BLOCK_N
                )
            j = j_start + o_n
            in_j = j < hi
            if WINDOW and not PLAIN:  # keys between two kept rows' windows are not to be read
                in_j = seen_by_kept(j, in_j, i_begin, i_end, window, Kept, CAUSAL)
            acc = dq_block(
                acc, q, qt, d_out, lse, lse_t, factor, shift, i, in_i, j, in_j, end,
                window, ds_scale, Q, dOut, Qt, stride_qn, stride_don, stride_qtn,
                head_at(K, j_start, h // group, stride_kn, stride_kh),
                head_at(V, j_start, h // group, stride_vn, stride_vh),
                head_at(Kt, j_start, h // group_t, stride_ktn, stride_kth),
                stride_kn, stride_vn, stride_ktn, DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS,
                SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N,
                BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, True,
            )  # fmt: skip
    if SCALE_DS:
        acc = acc * tl.load(DsScale + 1)
    acc = acc * SCALE
    if not PLAIN:
        acc = tl.where(kept[:, None], acc, 0.0)
    store_rows(head_at(dQ, start, h, stride_dqn, stride_dqh), acc, in_i, stride_dqn, HEAD_DIM)


@triton.jit
def queries_of(begin, end, j_begin, j_end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Queries [lo, hi) that see some key of [j_begin, j_end); [full_lo, full_hi) see all."""
    lo, hi, full_lo, full_hi = begin, end, begin, end
    if CAUSAL:
        lo = j_begin
        full_lo = j_end - 1
    if WINDOW:
        hi = tl.minimum(end, j_end - 1 + window)
        full_hi = tl.minimum(end, j_begin + window)
        if not CAUSAL:
            lo = tl.maximum(begin, j_begin - window + 1)
            full_lo = tl.maximum(begin, j_end - window)
    return lo, hi, full_lo, full_hi


@triton.jit
def dkdv_block(
    dk, dv, k, v, kt, i, j, in_j, end, window, ds_scale, K, V, Kt, stride_kn, stride_vn, stride_ktn,
    Q, dOut, Qt, Lse, LseT, Factor, Shift, stride_qn, stride_don, stride_qtn,
    DEPTH: tl.constexpr, PLAIN: tl.constexpr, ALIGN: tl.constexpr, DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS^T Q and P^T dO of a block of queries to dk and dv [BLOCK_N, BLOCK_K].

    Q, dOut and Qt point to the block's first query; Lse, LseT, Factor and Shift to token 0.
    """
    in_i = i < end
    factor, teacher_term = 0.0, 0.0
    if ALIGN:
        # [BLOCK_M]
        factor = tl.load(Factor + i, mask=in_i, other=0.0)
    kept = in_i
    if PLAIN:
        # [BLOCK_M, BLOCK_K]
        q = load_rows(Q, in_i, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, MASKED, OPERAND)
    else:
        # A row of weight 0 may hold NaN, and 0 * NaN is NaN: it is not read.
        kept = factor != 0
        q = load_rows(Q, kept, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
    zero = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    # [BLOCK_N, BLOCK_M], keys by queries, as all up to ds
    z = product(
        k, q, zero, K, in_j, stride_kn, Q, kept, stride_qn,
        HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    s, tanh_z = scores(z, SCALE, SOFTCAP, LOG2E)
    lq = s - tl.load(Lse + i, mask=in_i, other=0.0)[None, :]
    p = tl.exp2(lq)
    # dP's accumulator starts from the other terms of the bracket, as in dq_block.
    ds_over_p = tl.broadcast_to(-tl.load(Shift + i, mask=in_i, other=0.0)[None, :], p.shape)
    if ALIGN:
        factor = factor[None, :]
        # [BLOCK_M, BLOCK_KT]
        qt = load_rows(Qt, in_i, stride_qtn, HEAD_DIM_T, BLOCK_M, BLOCK_KT, MASKED, OPERAND)
        zt = product(
            kt, qt, zero, Kt, in_j, stride_ktn, Qt, in_i, stride_qtn,
            HEAD_DIM_T, BLOCK_KT, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
        # [1, BLOCK_M]
        lse_t = tl.load(LseT + i, mask=in_i, other=0.0)[None, :]
        ds_over_p, teacher_term = alignment(
            ds_over_p, teacher_term, zt, lq, lse_t, factor,
            PLAIN, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP,
        )  # fmt: skip
    if MASKED:
        mask = visible(i[None, :], j[:, None], end, window, CAUSAL, WINDOW)
    if PLAIN:
        # [BLOCK_M, BLOCK_K]
        d_out = load_rows(dOut, in_i, stride_don, HEAD_DIM, BLOCK_M, BLOCK_K, MASKED, OPERAND)
        # p of pairs that the mask hides is not 0; ds is masked below.
        p_visible = p
        if MASKED:
            p_visible = tl.where(mask, p, 0.0)
        # dV before dP: after it, P in the operand's dtype is not needed any more.
        dv = tl.dot(p_visible.to(OPERAND), d_out, dv, input_precision=PRECISION, out_dtype=ACC)
        ds_over_p = product(
            v, d_out, ds_over_p, V, in_j, stride_vn, dOut, in_i, stride_don,
            HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
    ds = d_scores(p, ds_over_p, teacher_term, tanh_z, factor, PLAIN, ALIGN, DIVERGENCE, SOFTCAP)
    if MASKED:
        ds = tl.where(mask, ds, 0.0)
    ds = (ds * ds_scale).to(OPERAND)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    V,  # [N, J, K]
    dOut,  # [N, H, K]
    Qt,  # [N, H, Kt]: teacher
    Kt,  # [N, Jt, Kt]
    Lse,  # [H, N], base 2, finite where a row has no key
    LseT,  # [H, N], the same of the teacher
    Factor,  # [N]
    Shift,  # [H, N]
    DsScale,  # [2]: as in attention_dq_kernel
    dK,  # [N, J, K]
    dV,  # [N, J, K]
    Tiles,  # [3, P], of keys
    First,  # [P]: index of the sequence's first block of queries in Rank
    Rank,  # [blocks + 1]: how many of the blocks of queries before this one have a kept row
    Live,  # [live blocks]: first tokens of the blocks that have one
    Kept,  # [N + 1]: how many of the rows before this one are kept
    tokens, group, group_t, window,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_don, stride_doh,
    stride_qtn, stride_qth, stride_ktn, stride_kth, stride_dkn, stride_dkh, stride_dvn, stride_dvh,
    PLAIN: tl.constexpr, ALIGN: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr, SCALE_DS: tl.constexpr, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr,
    SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    begin, end, start = tile_at(Tiles, tl.program_id(0), tl.num_programs(0))
    if start >= end:
        return
    lo, hi, full_lo, full_hi = queries_of(
        begin, end, start, tl.minimum(start + BLOCK_N, end), window, CAUSAL, WINDOW
    )
    if TILES != "all":
        live = tl.load(Kept + hi) > tl.load(Kept + lo)
        if live == (TILES == "dead"):
            return
    h_kv = tl.program_id(1)
    # Down to a multiple of BLOCK_M from the sequence's start, as the blocks in Rank are.
    lo = begin + (lo - begin) // BLOCK_M * BLOCK_M
    blocks, full_begin, full_end = blocks_of(lo, hi, full_lo, full_hi, BLOCK_M)
    first_block = lo * 0  # 0 of lo's type
    if not PLAIN:
        # Blocks are indices into Live here; `blocks` becomes the end of the range.
        Rank += tl.load(First + tl.program_id(0)) + (lo - begin) // BLOCK_M
        first_block, blocks = tl.load(Rank), tl.load(Rank + blocks)
    # [BLOCK_N]: keys
    j = start + tl.arange(0, BLOCK_N)
    in_j = j < end
    o_m = tl.arange(0, BLOCK_M)
    K = head_at(K, start, h_kv, stride_kn, stride_kh)
    V = head_at(V, start, h_kv, stride_vn, stride_vh)
    # [BLOCK_N, BLOCK_K]
    k = load_rows(K, in_j, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, True, OPERAND)
    v, kt, dv, ds_scale = k, k, 0.0, 1.0
    if ALIGN and BLOCK_KT != BLOCK_K:  # kt is assigned in a loop: its shape must not change
        kt = tl.zeros([BLOCK_N, BLOCK_KT], k.dtype)
    dk = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    if PLAIN:
        # [BLOCK_N, BLOCK_K]
        v = load_rows(V, in_j, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_K, True, OPERAND)
        dv = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    if SCALE_DS:
        ds_scale = tl.load(DsScale)
    for h in range(h_kv * group, h_kv * group + group):
        o_head = tl.cast(h, tl.int64) * tokens
        Kt_h = head_at(Kt, start, tl.cast(h // group_t, tl.int32), stride_ktn, stride_kth)
        if ALIGN:
            # [BLOCK_N, BLOCK_KT]
            kt = load_rows(Kt_h, in_j, stride_ktn, HEAD_DIM_T, BLOCK_N, BLOCK_KT, True, OPERAND)
        if SPLIT:
            # Full blocks, without a mask
            for block in range(full_begin, full_end):
                i_start = lo + block * BLOCK_M
                dk, dv = dkdv_block(
                    dk, dv, k, v, kt, i_start + o_m, j, in_j, end, window, ds_scale,
                    K, V, Kt_h, stride_kn, stride_vn, stride_ktn,
                    head_at(Q, i_start, tl.cast(h, tl.int32), stride_qn, stride_qh),
                    head_at(dOut, i_start, tl.cast(h, tl.int32), stride_don, stride_doh),
                    head_at(Qt, i_start, tl.cast(h, tl.int32), stride_qtn, stride_qth),
                    Lse + o_head, LseT + o_head, Factor, Shift + o_head, stride_qn, stride_don,
                    stride_qtn, DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS, SCALE, SCALE_T, SOFTCAP,
                    CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_KT,
                    OPERAND, ACC, PRECISION, False,
                )  # fmt: skip
        # The other blocks, or all without SPLIT, masked
        for block in range(first_block, blocks - (full_end - full_begin) if SPLIT else blocks):
            if SPLIT:
                i_start = (
                    lo
                    + tl.where(block < full_begin, block, block + full_end - full_begin) * BLOCK_M
                )
            elif PLAIN:
                i_start = lo + block * BLOCK_M
            else:
                i_start = tl.load(Live + block)
            dk, dv = dkdv_block(
                dk, dv, k, v, kt, i_start + o_m, j, in_j, end, window, ds_scale,
                K, V, Kt_h, stride_kn, stride_vn, stride_ktn,
                head_at(Q, i_start, tl.cast(h, tl.int32), stride_qn, stride_qh),
                head_at(dOut, i_start, tl.cast(h, tl.int32), stride_don, stride_doh),
                head_at(Qt, i_start, tl.cast(h, tl.int32), stride_qtn, stride_qth),
                Lse + o_head, LseT + o_head, Factor, Shift + o_head, stride_qn, stride_don,
                stride_qtn, DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS, SCALE, SCALE_T, SOFTCAP,
                CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND,
                ACC, PRECISION, True,
            )  # fmt: skip
    if SCALE_DS:
        dk = dk * tl.load(DsScale + 1)
    store_rows(
        head_at(dK, start, h_kv, stride_dkn, stride_dkh), dk * SCALE, in_j, stride_dkn, HEAD_DIM
    )
    if PLAIN:
        store_rows(head_at(dV, start, h_kv, stride_dvn, stride_dvh), dv, in_j, stride_dvn, HEAD_DIM)
