"""The divergence of two attention maps over sampled keys: each query has its own list of keys.

    sampled_statistics_kernel   logsumexps, divergence and statistic of a query and its heads
    sampled_dq_kernel           gradient of the same query
    sampled_dk_kernel           gradient of a key, over the list of queries that sampled it: no
                                atomics, so deterministic

The mathematics and the names are those of `oisd_kernels.attention.kernels` and `backward_kernels`,
over the slots of a query instead of a range of keys: j holds the keys of a block of slots, -1 where
a slot is empty. Such a slot does not count, and no key is read for it. A program of the first two
kernels takes one query and the HEADS query heads that read the same key head in the student and in
the teacher; they are the rows of a small product with the gathered keys. The statistics loop twice
over the slots, since the divergence needs both logsumexps.

Letters: N tokens, H query heads, J key heads, K head dimension, M slots, E pairs of a query and a
slot that counts. ROWS is HEADS rounded up to what tl.dot takes.
"""

# pyright: reportGeneralTypeIssues=false
# (pyright believes that a jitted function returns None, which cannot be unpacked)

import triton
import triton.language as tl

from oisd_kernels.attention.backward_kernels import alignment, d_scores
from oisd_kernels.attention.kernels import LOG2E, head_at, scores
from oisd_kernels.divergences import log_probability, terms


@triton.jit
def load_heads(
    X, i, h, stride_n, stride_h, HEADS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Loads heads h, h + 1, ... of token i, [ROWS, BLOCK_K]: 0 from HEADS and HEAD_DIM on."""
    o_h, o_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    # [ROWS, BLOCK_K]
    p_x = head_at(X, i, h, stride_n, stride_h) + o_h[:, None] * stride_h + o_k[None, :]
    x = tl.load(p_x, mask=(o_h < HEADS)[:, None] & (o_k < HEAD_DIM)[None, :], other=0.0)
    return x.to(OPERAND)


@triton.jit
def gather(
    X, tokens, in_rows,
    stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Loads rows `tokens` [BLOCK] of X, [BLOCK, BLOCK_K]: 0 where not in_rows, from HEAD_DIM on."""
    o_k = tl.arange(0, BLOCK_K)
    # [BLOCK, BLOCK_K]; int64, since the product may exceed 2^31
    p_x = X + tokens.to(tl.int64)[:, None] * stride_n + o_k[None, :]
    return tl.load(p_x, mask=in_rows[:, None] & (o_k < HEAD_DIM)[None, :], other=0.0).to(OPERAND)


@triton.jit
def sampled_scores(
    q, K, j, stride_kn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores times UNIT [ROWS, BLOCK], the softcap's tanh, and the keys j [BLOCK, BLOCK_K]."""
    k = gather(K, j, j >= 0, stride_kn, HEAD_DIM, BLOCK_K, OPERAND)
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    s, tanh_z = scores(z, SCALE, SOFTCAP, UNIT)
    return s, tanh_z, k


@triton.jit
def add_exponentials(m, l, s):  # noqa: E741
    """One step of an online logsumexp in base e; m and l [ROWS], s [ROWS, BLOCK].

    s holds -inf where a slot is empty.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row without a key so far has m = -inf, and -inf - -inf is NaN.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    return m_new, l * tl.exp(m - m_safe) + tl.sum(tl.exp(s - m_safe[:, None]), 1)


@triton.jit
def with_sink(lse, Sink, h, HEADS: tl.constexpr):
    """Logsumexp [ROWS] of the keys and the sinks of heads h, h + 1, ..."""
    if Sink is None:
        return lse
    else:
        o_h = tl.arange(0, lse.shape[0])
        sink = tl.load(Sink + h + o_h, mask=o_h < HEADS, other=-float("inf"))
        top = tl.maximum(lse, sink)
        return top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))


@triton.jit
def sampled_statistics_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    Qt,  # [N, H, Kt]: teacher
    Kt,  # [N, Jt, Kt]
    Sink,  # [H], or None
    SinkT,  # [H], or None
    Slots,  # [N, M]: keys, or -1
    Keep,  # [N]: 0 for queries to leave out
    Value,  # [H, N]
    Lse,  # [H, N], over the keys; without one 0, or -inf if there is a sink
    LseT,  # [H, N]
    Statistic,  # [H, N]
    tokens, slots, group, group_t,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_qtn, stride_qth, stride_ktn, stride_kth,
    HAS_KEEP: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, h = tl.program_id(0), tl.program_id(1) * HEADS
    if HAS_KEEP:
        if tl.load(Keep + i) == 0:
            return
    # [ROWS, BLOCK_K]
    q = load_heads(Q, i, h, stride_qn, stride_qh, HEADS, ROWS, HEAD_DIM, BLOCK_K, OPERAND)
    # [ROWS, BLOCK_KT]
    qt = load_heads(Qt, i, h, stride_qtn, stride_qth, HEADS, ROWS, HEAD_DIM_T, BLOCK_KT, OPERAND)
    K += (h // group).to(tl.int64) * stride_kh
    Kt += (h // group_t).to(tl.int64) * stride_kth
    Slots += i.to(tl.int64) * slots
    o_n = tl.arange(0, BLOCK)
    # Online logsumexps of student (m, l) and teacher (mt, lt), [ROWS]
    m = tl.full([ROWS], -float("inf"), ACC)
    mt = tl.full([ROWS], -float("inf"), ACC)
    l = tl.zeros([ROWS], ACC)  # noqa: E741
    lt = tl.zeros([ROWS], ACC)
    for start in range(0, slots, BLOCK):
        # [BLOCK]
        j = tl.load(Slots + start + o_n, mask=start + o_n < slots, other=-1)
        # [ROWS, BLOCK]
        s, _, _ = sampled_scores(
            q, K, j, stride_kn, SCALE, SOFTCAP, 1.0, HEAD_DIM, BLOCK_K, OPERAND, ACC, PRECISION
        )
        # [ROWS, BLOCK]
        st, _, _ = sampled_scores(
            qt, Kt, j, stride_ktn,
            SCALE_T, SOFTCAP, 1.0, HEAD_DIM_T, BLOCK_KT, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        m, l = add_exponentials(m, l, tl.where((j >= 0)[None, :], s, -float("inf")))  # noqa: E741
        mt, lt = add_exponentials(mt, lt, tl.where((j >= 0)[None, :], st, -float("inf")))
    # Without a key: 0, so that differences stay finite.
    lse = tl.where(l == 0, 0.0, m + tl.log(tl.where(l == 0, 1.0, l)))
    lse_t = tl.where(lt == 0, 0.0, mt + tl.log(tl.where(lt == 0, 1.0, lt)))
    keys_lse, keys_lse_t = lse, lse_t
    if Sink is not None or SinkT is not None:
        keys_lse = tl.where(l == 0, -float("inf"), lse)
        keys_lse_t = tl.where(lt == 0, -float("inf"), lse_t)
        # What follows sums over the keys alone, in distributions that have the sinks too.
        lse, lse_t = with_sink(lse, Sink, h, HEADS), with_sink(lse_t, SinkT, h, HEADS)
    value = tl.zeros([ROWS], ACC)
    statistic = tl.zeros([ROWS], ACC)
    for start in range(0, slots, BLOCK):
        # [BLOCK]
        j = tl.load(Slots + start + o_n, mask=start + o_n < slots, other=-1)
        # [ROWS, BLOCK]
        s, _, _ = sampled_scores(
            q, K, j, stride_kn, SCALE, SOFTCAP, 1.0, HEAD_DIM, BLOCK_K, OPERAND, ACC, PRECISION
        )
        # [ROWS, BLOCK]
        st, _, _ = sampled_scores(
            qt, Kt, j, stride_ktn,
            SCALE_T, SOFTCAP, 1.0, HEAD_DIM_T, BLOCK_KT, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        lq = log_probability(tl.where((j >= 0)[None, :], s, -float("inf")), lse[:, None])
        lp = log_probability(tl.where((j >= 0)[None, :], st, -float("inf")), lse_t[:, None])
        # [ROWS, BLOCK] each; p is the student's probability. An empty slot has p = 0 in both maps.
        term, inner, p = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
        value += tl.sum(term, 1)
        if DIVERGENCE == "jsd":
            statistic += tl.sum(p * inner, 1)
        elif DIVERGENCE == "reverse_kl":
            statistic -= tl.sum(p * inner, 1)
    o_h = tl.arange(0, ROWS)
    # [ROWS]
    o_out = (h + o_h).to(tl.int64) * tokens + i
    tl.store(Value + o_out, value, mask=o_h < HEADS)
    tl.store(Lse + o_out, keys_lse, mask=o_h < HEADS)
    tl.store(LseT + o_out, keys_lse_t, mask=o_h < HEADS)
    if DIVERGENCE != "forward_kl":
        tl.store(Statistic + o_out, statistic, mask=o_h < HEADS)


@triton.jit
def sampled_dq_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    Qt,  # [N, H, Kt]
    Kt,  # [N, Jt, Kt]
    Slots,  # [N, M]
    Lse,  # [H, N], base 2
    LseT,  # [H, N], base 2
    Factor,  # [N]
    Shift,  # [H, N]
    DsScale,  # [2]
    dQ,  # [N, H, K], zeros
    tokens, slots, group, group_t,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_qtn, stride_qth, stride_ktn, stride_kth,
    stride_dqn, stride_dqh,
    SCALE_DS: tl.constexpr, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr, SCALE: tl.constexpr,
    SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, h = tl.program_id(0), tl.program_id(1) * HEADS
    factor = tl.load(Factor + i)
    if factor == 0:
        return
    # [ROWS, BLOCK_K]
    q = load_heads(Q, i, h, stride_qn, stride_qh, HEADS, ROWS, HEAD_DIM, BLOCK_K, OPERAND)
    # [ROWS, BLOCK_KT]
    qt = load_heads(Qt, i, h, stride_qtn, stride_qth, HEADS, ROWS, HEAD_DIM_T, BLOCK_KT, OPERAND)
    K += (h // group).to(tl.int64) * stride_kh
    Kt += (h // group_t).to(tl.int64) * stride_kth
    Slots += i.to(tl.int64) * slots
    o_h, o_n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    # [ROWS]
    at = (h + o_h).to(tl.int64) * tokens + i
    # [ROWS, 1] each
    lse = tl.load(Lse + at, mask=o_h < HEADS, other=0.0)[:, None]
    lse_t = tl.load(LseT + at, mask=o_h < HEADS, other=0.0)[:, None]
    shift = tl.load(Shift + at, mask=o_h < HEADS, other=0.0)[:, None]
    ds_scale = 1.0
    if SCALE_DS:
        ds_scale = tl.load(DsScale)
    acc = tl.zeros([ROWS, BLOCK_K], ACC)
    for start in range(0, slots, BLOCK):
        # [BLOCK]
        j = tl.load(Slots + start + o_n, mask=start + o_n < slots, other=-1)
        # [ROWS, BLOCK] twice, and [BLOCK, BLOCK_K]
        s, tanh_z, k = sampled_scores(
            q, K, j, stride_kn,
            SCALE, SOFTCAP, LOG2E, HEAD_DIM, BLOCK_K, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        # [BLOCK, BLOCK_KT]
        kt = gather(Kt, j, j >= 0, stride_ktn, HEAD_DIM_T, BLOCK_KT, OPERAND)
        # [ROWS, BLOCK], like all that follows up to ds
        zt = tl.dot(qt, tl.trans(kt), input_precision=PRECISION, out_dtype=ACC)
        lq = s - lse
        ds_over_p = tl.broadcast_to(-shift, lq.shape)
        ds_over_p, teacher_term = alignment(
            ds_over_p, 0.0, zt, lq, lse_t, factor, False, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP
        )
        ds = d_scores(
            tl.exp2(lq), ds_over_p, teacher_term, tanh_z, factor, False, True, DIVERGENCE, SOFTCAP
        )
        # Scaled before it is rounded to OPERAND; divided out after the loop.
        ds = tl.where((j >= 0)[None, :], ds, 0.0) * ds_scale
        acc = tl.dot(ds.to(OPERAND), k, acc, input_precision=PRECISION, out_dtype=ACC)
    if SCALE_DS:
        acc = acc * tl.load(DsScale + 1)
    o_k = tl.arange(0, BLOCK_K)
    # [ROWS, BLOCK_K]
    at = head_at(dQ, i, h, stride_dqn, stride_dqh) + o_h[:, None] * stride_dqh + o_k[None, :]
    in_dq = (o_h < HEADS)[:, None] & (o_k < HEAD_DIM)[None, :]
    tl.store(at, (acc * SCALE).to(dQ.dtype.element_ty), mask=in_dq)


@triton.jit
def sampled_dk_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    Qt,  # [N, H, Kt]
    Kt,  # [N, Jt, Kt]
    First,  # [N + 1]: index of a key's first query in Queries
    Queries,  # [E]: grouped by key, in order, all with a factor other than 0
    Lse,  # [H, N], base 2
    LseT,  # [H, N], base 2
    Factor,  # [N]
    Shift,  # [H, N]
    dK,  # [N, J, K]
    tokens, group, group_t,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_qtn, stride_qth, stride_ktn, stride_kth,
    stride_dkn, stride_dkh,
    DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    j, h_kv = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(First + j), tl.load(First + j + 1)
    o_k, o_kt, o_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_KT), tl.arange(0, BLOCK)
    is_sampled = begin < end
    # A key that no query sampled may hold NaN, so it is not read.
    p_k = head_at(K, j, h_kv, stride_kn, stride_kh)
    # [BLOCK_K]. One key against BLOCK queries is a vector product: no tl.dot, sums in ACC.
    k = tl.load(p_k + o_k, mask=(o_k < HEAD_DIM) & is_sampled, other=0.0).to(ACC)
    acc = tl.zeros([BLOCK_K], ACC)
    for h in range(h_kv * group, h_kv * group + group):
        p_kt = head_at(Kt, j, tl.cast(h // group_t, tl.int32), stride_ktn, stride_kth)
        # [BLOCK_KT]
        kt = tl.load(p_kt + o_kt, mask=(o_kt < HEAD_DIM_T) & is_sampled, other=0.0).to(ACC)
        o_head = tl.cast(h, tl.int64) * tokens
        Q_h = Q + tl.cast(h, tl.int64) * stride_qh
        Qt_h = Qt + tl.cast(h, tl.int64) * stride_qth
        for start in range(begin, end, BLOCK):
            in_i = start + o_m < end
            # [BLOCK]: queries
            i = tl.load(Queries + start + o_m, mask=in_i, other=0)
            # [BLOCK, BLOCK_K]
            q = gather(Q_h, i, in_i, stride_qn, HEAD_DIM, BLOCK_K, ACC)
            # [BLOCK, BLOCK_KT]
            qt = gather(Qt_h, i, in_i, stride_qtn, HEAD_DIM_T, BLOCK_KT, ACC)
            # [BLOCK], like all that follows up to ds
            factor = tl.load(Factor + i, mask=in_i, other=0.0)
            lse = tl.load(Lse + o_head + i, mask=in_i, other=0.0)
            lse_t = tl.load(LseT + o_head + i, mask=in_i, other=0.0)
            ds_over_p = -tl.load(Shift + o_head + i, mask=in_i, other=0.0)
            s, tanh_z = scores(tl.sum(q * k[None, :], 1), SCALE, SOFTCAP, LOG2E)
            zt = tl.sum(qt * kt[None, :], 1)
            lq = s - lse
            ds_over_p, teacher_term = alignment(
                ds_over_p, 0.0, zt, lq, lse_t, factor, False, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP
            )
            # d_scores gives 0 where the factor is 0, so also where not in_i.
            ds = d_scores(
                tl.exp2(lq),
                ds_over_p,
                teacher_term,
                tanh_z,
                factor,
                False,
                True,
                DIVERGENCE,
                SOFTCAP,
            )
            acc += tl.sum(ds[:, None] * q, 0)
    p_dk = head_at(dK, j, h_kv, stride_dkn, stride_dkh) + o_k
    tl.store(p_dk, (acc * SCALE).to(dK.dtype.element_ty), mask=o_k < HEAD_DIM)
