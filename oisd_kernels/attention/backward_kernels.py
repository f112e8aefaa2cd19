"""Gradient of attention and of the divergence of two attention maps, in one recomputation of P.

    attention_dq_kernel     a program takes a tile of queries and walks over its keys
    attention_dkdv_kernel   a program takes a tile of keys, and walks over the queries that see it,
                            of all the query heads that read its key head: no atomics, deterministic

With P the student's map, T the teacher's, D = log T/P, g the row's weight, a its statistic:

    dS = P * (dP - delta)                     PLAIN, dP = dO V^T, delta = rowsum(dO * O) - dLse
       + P * (-(1-beta) * g) * (s - a)        ALIGN, jsd: s = softplus(D + log(beta/(1-beta))),
                                              a = <P, s>
       + P * -g * (D + a)                     ALIGN, reverse_kl: a = -<P, D>
       + P * g - T * g                        ALIGN, forward_kl
    dQ = scale * dS K,  dK = scale * dS^T Q,  dV = P^T dO

and a softcap multiplies dS by 1 - tanh^2. What is constant in a row comes from the launcher as two
numbers, `factor` and `shift`, such that dS = P * (dP + factor * inner - shift), and for forward_kl
dS = P * (dP - shift) + factor * T: registers are what a tile's size hangs on. dK and dV come from
transposed scores, K Q^T, so that P^T and dS^T are left operands and stay in registers.

Rows with factor 0 take no part in ALIGN, whatever they hold. SPLIT gives full blocks a loop of
their own, without masks, in plain launches. A second loop costs registers, and beside the
alignment, whose elementwise work is several times a mask's, it gains little. TILES says which tiles
a launch works on: "all"; or "live", those with a row of factor not 0, and "dead", the others,
for PLAIN and ALIGN together: two launches share the output, and the second reads no teacher.

Letters as in `attention_kernels`.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes the unpacking of what a kernel's function returns for the unpacking of nothing)

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
    x, tail, zt, lq, lse_t, factor,
    PLAIN: tl.constexpr, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr,
    SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """What the alignment adds to x and to the tail in dS = P * (x + dP) + tail."""
    st, _ = scores(zt, SCALE_T, SOFTCAP, LOG2E)
    lp = st - lse_t
    if DIVERGENCE == "forward_kl":
        tail = factor * tl.exp2(lp)
        if PLAIN:
            tail = tl.where(factor != 0, tail, 0.0)
    else:
        e = factor * inner((lp - lq) * LN2, DIVERGENCE, LOG_ODDS)
        if PLAIN:  # else all of dS is cleared where the factor is 0
            e = tl.where(factor != 0, e, 0.0)
        x += e
    return x, tail


@triton.jit
def d_scores(
    p, x, tail, t, factor,
    PLAIN: tl.constexpr, ALIGN: tl.constexpr, DIVERGENCE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    ds = p * x
    if ALIGN:
        if DIVERGENCE == "forward_kl":
            ds += tail
        if not PLAIN:
            ds = tl.where(factor != 0, ds, 0.0)
    if SOFTCAP is not None:
        ds = ds * (1 - t * t)
    return ds


@triton.jit
def dq_block(
    acc, q, qt, d_out, lse, lse_t, factor, shift, i, own, j, keys, end, window, boost,
    Q, dOut, Qt, stride_qn, stride_don, stride_qtn, K, V, Kt, stride_kn, stride_vn, stride_ktn,
    DEPTH: tl.constexpr, PLAIN: tl.constexpr, ALIGN: tl.constexpr, DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS K of a block of keys; K, V, Kt point to it. No row sees any but `keys`."""
    k = load_rows(K, keys, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
    nothing = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    z = product(
        q, k, nothing, Q, own, stride_qn, K, keys, stride_kn,
        HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    s, t = scores(z, SCALE, SOFTCAP, LOG2E)
    lq = s - lse[:, None]
    p = tl.exp2(lq)
    x = tl.broadcast_to(-shift[:, None], p.shape)
    tail = 0.0
    if ALIGN:
        kt = load_rows(Kt, keys, stride_ktn, HEAD_DIM_T, BLOCK_N, BLOCK_KT, MASKED, OPERAND)
        zt = product(
            qt, kt, nothing, Qt, own, stride_qtn, Kt, keys, stride_ktn,
            HEAD_DIM_T, BLOCK_KT, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
        x, tail = alignment(
            x, tail, zt, lq, lse_t[:, None], factor[:, None],
            PLAIN, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP,
        )  # fmt: skip
    if PLAIN:
        v = load_rows(V, keys, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
        x = product(
            d_out, v, x, dOut, own, stride_don, V, keys, stride_vn,
            HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
    ds = d_scores(p, x, tail, t, factor[:, None], PLAIN, ALIGN, DIVERGENCE, SOFTCAP)
    if MASKED:
        seen = visible(i[:, None], j[None, :], end, window, CAUSAL, WINDOW)
        ds = tl.where(seen, ds, 0.0)
    ds = (ds * boost).to(OPERAND)
    return tl.dot(ds, k, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def seen_by_some(j, keys, a, b, window, Kept, CAUSAL: tl.constexpr):
    """Which of the keys j some row of weight other than 0 in [a, b) sees through its window."""
    first = j if CAUSAL else j - window + 1
    before = tl.load(Kept + tl.maximum(first, a), mask=keys, other=0)
    return tl.load(Kept + tl.minimum(j + window, b), mask=keys, other=0) > before


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
    Boost,  # [2]: a power of two that lifts dS into the operand's range, and its inverse
    dQ,  # [N, H, K]
    Tiles,  # [3, P]
    Kept,  # [N + 1]: how many of the rows before this one have a weight other than 0
    tokens,
    group,
    group_t,
    window,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_don,
    stride_doh,
    stride_qtn,
    stride_qth,
    stride_ktn,
    stride_kth,
    stride_dqn,
    stride_dqh,
    PLAIN: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    BOOST: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    programs = tl.num_programs(0)
    # Late tiles see the most keys: they start first.
    begin, end, start = tile_at(Tiles, programs - 1 - tl.program_id(0), programs)
    if start >= end:
        return
    h = tl.program_id(1)
    i = start + tl.arange(0, BLOCK_M)
    rows = i < end
    kept = rows
    a, b = start, tl.minimum(start + BLOCK_M, end)
    if ALIGN or TILES == "dead":
        kept = tl.load(Factor + i, mask=rows, other=0.0) != 0
        live = tl.max(kept.to(tl.int32), 0) > 0
        if TILES != "all":
            if live == (TILES == "dead"):
                return
    if not PLAIN:
        # Keys that none of the kept rows sees are not read: 0 * NaN is NaN.
        a = tl.min(tl.where(kept, i, end), 0)
        b = tl.max(tl.where(kept, i + 1, begin), 0)
    acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    if a < b:
        per_row = h.to(tl.int64) * tokens
        lanes = tl.arange(0, BLOCK_N)
        Q = head_at(Q, start, h, stride_qn, stride_qh)
        dOut = head_at(dOut, start, h, stride_don, stride_doh)
        Qt = head_at(Qt, start, h, stride_qtn, stride_qth)
        q = load_rows(Q, rows, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
        lse = tl.load(Lse + per_row + i, mask=rows, other=0.0)
        shift = tl.load(Shift + per_row + i, mask=rows, other=0.0)
        d_out, qt, lse_t, factor, boost = q, q, lse, lse, 1.0
        if PLAIN:
            d_out = load_rows(dOut, rows, stride_don, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
        if ALIGN:
            qt = load_rows(Qt, rows, stride_qtn, HEAD_DIM_T, BLOCK_M, BLOCK_KT, True, OPERAND)
            lse_t = tl.load(LseT + per_row + i, mask=rows, other=0.0)
            factor = tl.load(Factor + i, mask=rows, other=0.0)
        if BOOST:
            boost = tl.load(Boost)
        lo, hi, full_lo, full_hi = keys_of(begin, end, a, b, window, CAUSAL, WINDOW)
        blocks, left, right = blocks_of(lo, hi, full_lo, full_hi, BLOCK_N)
        if SPLIT:
            for n in range(left, right):
                step = lo + n * BLOCK_N
                j = step + lanes
                acc = dq_block(
                    acc, q, qt, d_out, lse, lse_t, factor, shift, i, rows, j, j < hi, end,
                    window, boost, Q, dOut, Qt, stride_qn, stride_don, stride_qtn,
                    head_at(K, step, h // group, stride_kn, stride_kh),
                    head_at(V, step, h // group, stride_vn, stride_vh),
                    head_at(Kt, step, h // group_t, stride_ktn, stride_kth),
                    stride_kn, stride_vn, stride_ktn, DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS,
                    SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N,
                    BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, False,
                )  # fmt: skip
            blocks -= right - left
        for n in range(0, blocks):
            step = lo + n * BLOCK_N
            if SPLIT:
                step = lo + tl.where(n < left, n, n + right - left) * BLOCK_N
            j = step + lanes
            keys = j < hi
            if WINDOW and not PLAIN:  # the windows of two kept rows may leave keys between them
                keys = seen_by_some(j, keys, a, b, window, Kept, CAUSAL)
            acc = dq_block(
                acc, q, qt, d_out, lse, lse_t, factor, shift, i, rows, j, keys, end,
                window, boost, Q, dOut, Qt, stride_qn, stride_don, stride_qtn,
                head_at(K, step, h // group, stride_kn, stride_kh),
                head_at(V, step, h // group, stride_vn, stride_vh),
                head_at(Kt, step, h // group_t, stride_ktn, stride_kth),
                stride_kn, stride_vn, stride_ktn, DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS,
                SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N,
                BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, True,
            )  # fmt: skip
    if BOOST:
        acc = acc * tl.load(Boost + 1)
    acc = acc * SCALE
    if not PLAIN:
        acc = tl.where(kept[:, None], acc, 0.0)
    store_rows(head_at(dQ, start, h, stride_dqn, stride_dqh), acc, rows, stride_dqn, HEAD_DIM)


@triton.jit
def queries_of(begin, end, a, b, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Queries that see some key of [a, b), and those that see all of them: lo, hi, full lo, hi."""
    lo, hi, full_lo, full_hi = begin, end, begin, end
    if CAUSAL:
        lo = a
        full_lo = b - 1
    if WINDOW:
        hi = tl.minimum(end, b - 1 + window)
        full_hi = tl.minimum(end, a + window)
        if not CAUSAL:
            lo = tl.maximum(begin, a - window + 1)
            full_lo = tl.maximum(begin, b - window)
    return lo, hi, full_lo, full_hi


@triton.jit
def dkdv_block(
    dk, dv, k, v, kt, i, j, own, end, window, boost,
    K, V, Kt, stride_kn, stride_vn, stride_ktn,
    Q, dOut, Qt, Lse, LseT, Factor, Shift, stride_qn, stride_don, stride_qtn,
    DEPTH: tl.constexpr, PLAIN: tl.constexpr, ALIGN: tl.constexpr, DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS^T Q and P^T dO of a block of queries; Q, dOut, Qt point to it, the others to rows."""
    rows = i < end
    factor, tail = 0.0, 0.0
    if ALIGN:
        factor = tl.load(Factor + i, mask=rows, other=0.0)
    kept = rows
    if PLAIN:
        q = load_rows(Q, rows, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, MASKED, OPERAND)
    else:
        # A row without weight may hold NaN, and 0 * NaN is NaN.
        kept = factor != 0
        q = load_rows(Q, kept, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
    nothing = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    z = product(
        k, q, nothing, K, own, stride_kn, Q, kept, stride_qn,
        HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    s, t = scores(z, SCALE, SOFTCAP, LOG2E)
    lq = s - tl.load(Lse + i, mask=rows, other=0.0)[None, :]
    p = tl.exp2(lq)
    x = tl.broadcast_to(-tl.load(Shift + i, mask=rows, other=0.0)[None, :], p.shape)
    if ALIGN:
        factor = factor[None, :]
        qt = load_rows(Qt, rows, stride_qtn, HEAD_DIM_T, BLOCK_M, BLOCK_KT, MASKED, OPERAND)
        zt = product(
            kt, qt, nothing, Kt, own, stride_ktn, Qt, rows, stride_qtn,
            HEAD_DIM_T, BLOCK_KT, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
        lse_t = tl.load(LseT + i, mask=rows, other=0.0)[None, :]
        x, tail = alignment(
            x, tail, zt, lq, lse_t, factor, PLAIN, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP
        )
    if MASKED:
        seen = visible(i[None, :], j[:, None], end, window, CAUSAL, WINDOW)
    if PLAIN:
        d_out = load_rows(dOut, rows, stride_don, HEAD_DIM, BLOCK_M, BLOCK_K, MASKED, OPERAND)
        weight = p
        if MASKED:
            weight = tl.where(seen, p, 0.0)
        dv = tl.dot(weight.to(OPERAND), d_out, dv, input_precision=PRECISION, out_dtype=ACC)
        x = product(
            v, d_out, x, V, own, stride_vn, dOut, rows, stride_don,
            HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
        )  # fmt: skip
    ds = d_scores(p, x, tail, t, factor, PLAIN, ALIGN, DIVERGENCE, SOFTCAP)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    ds = (ds * boost).to(OPERAND)
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
    Boost,  # [2]
    dK,  # [N, J, K]
    dV,  # [N, J, K]
    Tiles,  # [3, P], of keys
    First,  # [P]: place of the sequence's first block of queries in Rank
    Rank,  # how many of the blocks of queries before this one have a row of weight other than 0
    Live,  # first tokens of those that have
    Kept,  # [N + 1]: how many of the rows before this one have a weight other than 0
    tokens,
    group,
    group_t,
    window,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_don,
    stride_doh,
    stride_qtn,
    stride_qth,
    stride_ktn,
    stride_kth,
    stride_dkn,
    stride_dkh,
    stride_dvn,
    stride_dvh,
    PLAIN: tl.constexpr,
    ALIGN: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    BOOST: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    head = tl.program_id(1)
    lo = begin + (lo - begin) // BLOCK_M * BLOCK_M
    blocks, left, right = blocks_of(lo, hi, full_lo, full_hi, BLOCK_M)
    first = lo * 0
    if not PLAIN:
        # Blocks count in the list of those that have a row to work on.
        Rank += tl.load(First + tl.program_id(0)) + (lo - begin) // BLOCK_M
        first, blocks = tl.load(Rank), tl.load(Rank + blocks)
    j = start + tl.arange(0, BLOCK_N)
    keys = j < end
    lanes = tl.arange(0, BLOCK_M)
    K = head_at(K, start, head, stride_kn, stride_kh)
    V = head_at(V, start, head, stride_vn, stride_vh)
    k = load_rows(K, keys, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, True, OPERAND)
    v, kt, dv, boost = k, k, 0.0, 1.0
    if ALIGN and BLOCK_KT != BLOCK_K:  # a variable of a loop keeps its shape
        kt = tl.zeros([BLOCK_N, BLOCK_KT], k.dtype)
    dk = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    if PLAIN:
        v = load_rows(V, keys, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_K, True, OPERAND)
        dv = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    if BOOST:
        boost = tl.load(Boost)
    for h in range(head * group, head * group + group):
        row = tl.cast(h, tl.int64) * tokens
        head_t = head_at(Kt, start, tl.cast(h // group_t, tl.int32), stride_ktn, stride_kth)
        if ALIGN:
            kt = load_rows(head_t, keys, stride_ktn, HEAD_DIM_T, BLOCK_N, BLOCK_KT, True, OPERAND)
        if SPLIT:
            for n in range(left, right):
                at = lo + n * BLOCK_M
                dk, dv = dkdv_block(
                    dk, dv, k, v, kt, at + lanes, j, keys, end, window, boost,
                    K, V, head_t, stride_kn, stride_vn, stride_ktn,
                    head_at(Q, at, tl.cast(h, tl.int32), stride_qn, stride_qh),
                    head_at(dOut, at, tl.cast(h, tl.int32), stride_don, stride_doh),
                    head_at(Qt, at, tl.cast(h, tl.int32), stride_qtn, stride_qth),
                    Lse + row, LseT + row, Factor, Shift + row, stride_qn, stride_don, stride_qtn,
                    DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS, SCALE, SCALE_T, SOFTCAP, CAUSAL,
                    WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND, ACC,
                    PRECISION, False,
                )  # fmt: skip
        for n in range(first, blocks - (right - left) if SPLIT else blocks):
            if SPLIT:
                at = lo + tl.where(n < left, n, n + right - left) * BLOCK_M
            elif PLAIN:
                at = lo + n * BLOCK_M
            else:
                at = tl.load(Live + n)
            dk, dv = dkdv_block(
                dk, dv, k, v, kt, at + lanes, j, keys, end, window, boost,
                K, V, head_t, stride_kn, stride_vn, stride_ktn,
                head_at(Q, at, tl.cast(h, tl.int32), stride_qn, stride_qh),
                head_at(dOut, at, tl.cast(h, tl.int32), stride_don, stride_doh),
                head_at(Qt, at, tl.cast(h, tl.int32), stride_qtn, stride_qth),
                Lse + row, LseT + row, Factor, Shift + row, stride_qn, stride_don, stride_qtn,
                DEPTH, PLAIN, ALIGN, DIVERGENCE, LOG_ODDS, SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW,
                HEAD_DIM, HEAD_DIM_T, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION,
                True,
            )  # fmt: skip
    if BOOST:
        dk = dk * tl.load(Boost + 1)
    store_rows(
        head_at(dK, start, head, stride_dkn, stride_dkh), dk * SCALE, keys, stride_dkn, HEAD_DIM
    )
    if PLAIN:
        store_rows(head_at(dV, start, head, stride_dvn, stride_dvh), dv, keys, stride_dvn, HEAD_DIM)
