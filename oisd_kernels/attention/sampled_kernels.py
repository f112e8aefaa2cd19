"""The divergence of two attention maps over sampled keys: a query gathers keys of its own.

    sampled_statistics_kernel   logsumexps, divergence and statistic of a query and its heads
    sampled_dq_kernel           gradient of the same query
    sampled_dk_kernel           gradient of a key, over the list of queries that sampled it: no
                                atomics, deterministic

The mathematics is that of `attention_kernels` and `attention_backward_kernels`, over the slots of a
query instead of a range of keys. A program of the first two takes one query and the HEADS query
heads that read one key head in the student and in the teacher; they are rows of a small product
with the gathered keys. The statistics walk twice over the slots, since the divergence needs both
logsumexps. A slot of -1 does not count, and its key is not read.

Letters: N tokens, H query heads, J key heads, K head dimension, M slots, E pairs of a query and a
slot that counts.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes the unpacking of what a kernel's function returns for the unpacking of nothing)

import triton
import triton.language as tl

from oisd_kernels.attention.backward_kernels import alignment, d_scores
from oisd_kernels.attention.kernels import LOG2E, head_at, scores
from oisd_kernels.divergences import log_probability, terms


@triton.jit
def load_heads(
    X, i, h, stride_n, stride_h, HEADS: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK_K]: heads h, h + 1, ... of token i, 0 from HEADS and from HEAD_DIM on."""
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    at = head_at(X, i, h, stride_n, stride_h) + row[:, None] * stride_h + k[None, :]
    x = tl.load(at, mask=(row < HEADS)[:, None] & (k < HEAD_DIM)[None, :], other=0.0)
    return x.to(OPERAND)


@triton.jit
def gather(
    X, rows, seen, stride_n, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr
):
    """[len(rows), BLOCK_K]: rows of X, 0 where not seen."""
    k = tl.arange(0, BLOCK_K)
    at = X + rows.to(tl.int64)[:, None] * stride_n + k[None, :]
    return tl.load(at, mask=seen[:, None] & (k < HEAD_DIM)[None, :], other=0.0).to(OPERAND)


@triton.jit
def sampled_scores(
    q, K, slots, stride_kn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores times UNIT [ROWS, BLOCK], the softcap's tanh, and the keys [BLOCK, BLOCK_K]."""
    keys = gather(K, slots, slots >= 0, stride_kn, HEAD_DIM, BLOCK_K, OPERAND)
    z = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    s, t = scores(z, SCALE, SOFTCAP, UNIT)
    return s, t, keys


@triton.jit
def add_exponentials(m, l, s):  # noqa: E741
    """One step of an online logsumexp, natural logarithm; s holds -inf where a slot is empty."""
    largest = tl.maximum(m, tl.max(s, 1))
    # Without a key so far: -inf - -inf is NaN.
    base = tl.where(largest == -float("inf"), 0.0, largest)
    return largest, l * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None]), 1)


@triton.jit
def sampled_statistics_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    Qt,  # [N, H, Kt]: teacher
    Kt,  # [N, Jt, Kt]
    Slots,  # [N, M]: tokens, or -1
    Keep,  # [N]
    Value,  # [H, N]
    Lse,  # [H, N], 0 without a key
    LseT,  # [H, N]
    Statistic,  # [H, N]
    tokens,
    slots,
    group,
    group_t,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_qtn,
    stride_qth,
    stride_ktn,
    stride_kth,
    HAS_KEEP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, h = tl.program_id(0), tl.program_id(1) * HEADS
    if HAS_KEEP:
        if tl.load(Keep + i) == 0:
            return
    q = load_heads(Q, i, h, stride_qn, stride_qh, HEADS, ROWS, HEAD_DIM, BLOCK_K, OPERAND)
    qt = load_heads(Qt, i, h, stride_qtn, stride_qth, HEADS, ROWS, HEAD_DIM_T, BLOCK_KT, OPERAND)
    K += (h // group).to(tl.int64) * stride_kh
    Kt += (h // group_t).to(tl.int64) * stride_kth
    Slots += i.to(tl.int64) * slots
    lanes = tl.arange(0, BLOCK)
    m = tl.full([ROWS], -float("inf"), ACC)
    mt = tl.full([ROWS], -float("inf"), ACC)
    l = tl.zeros([ROWS], ACC)  # noqa: E741
    lt = tl.zeros([ROWS], ACC)
    for first in range(0, slots, BLOCK):
        slot = tl.load(Slots + first + lanes, mask=first + lanes < slots, other=-1)
        s, _, _ = sampled_scores(
            q, K, slot, stride_kn, SCALE, SOFTCAP, 1.0, HEAD_DIM, BLOCK_K, OPERAND, ACC, PRECISION
        )
        st, _, _ = sampled_scores(
            qt, Kt, slot, stride_ktn,
            SCALE_T, SOFTCAP, 1.0, HEAD_DIM_T, BLOCK_KT, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        m, l = add_exponentials(m, l, tl.where((slot >= 0)[None, :], s, -float("inf")))  # noqa: E741
        mt, lt = add_exponentials(mt, lt, tl.where((slot >= 0)[None, :], st, -float("inf")))
    lse = tl.where(l == 0, 0.0, m + tl.log(tl.where(l == 0, 1.0, l)))
    lse_t = tl.where(lt == 0, 0.0, mt + tl.log(tl.where(lt == 0, 1.0, lt)))
    value = tl.zeros([ROWS], ACC)
    statistic = tl.zeros([ROWS], ACC)
    for first in range(0, slots, BLOCK):
        slot = tl.load(Slots + first + lanes, mask=first + lanes < slots, other=-1)
        s, _, _ = sampled_scores(
            q, K, slot, stride_kn, SCALE, SOFTCAP, 1.0, HEAD_DIM, BLOCK_K, OPERAND, ACC, PRECISION
        )
        st, _, _ = sampled_scores(
            qt, Kt, slot, stride_ktn,
            SCALE_T, SOFTCAP, 1.0, HEAD_DIM_T, BLOCK_KT, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        lq = log_probability(tl.where((slot >= 0)[None, :], s, -float("inf")), lse[:, None])
        lp = log_probability(tl.where((slot >= 0)[None, :], st, -float("inf")), lse_t[:, None])
        term, inner, p = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
        value += tl.sum(term, 1)
        if DIVERGENCE == "jsd":
            statistic += tl.sum(p * inner, 1)
        elif DIVERGENCE == "reverse_kl":
            statistic -= tl.sum(p * inner, 1)
    row = tl.arange(0, ROWS)
    at = (h + row).to(tl.int64) * tokens + i
    tl.store(Value + at, value, mask=row < HEADS)
    tl.store(Lse + at, lse, mask=row < HEADS)
    tl.store(LseT + at, lse_t, mask=row < HEADS)
    if DIVERGENCE != "forward_kl":
        tl.store(Statistic + at, statistic, mask=row < HEADS)


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
    Boost,  # [2]
    dQ,  # [N, H, K], zeros
    tokens,
    slots,
    group,
    group_t,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_qtn,
    stride_qth,
    stride_ktn,
    stride_kth,
    stride_dqn,
    stride_dqh,
    BOOST: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, h = tl.program_id(0), tl.program_id(1) * HEADS
    factor = tl.load(Factor + i)
    if factor == 0:
        return
    q = load_heads(Q, i, h, stride_qn, stride_qh, HEADS, ROWS, HEAD_DIM, BLOCK_K, OPERAND)
    qt = load_heads(Qt, i, h, stride_qtn, stride_qth, HEADS, ROWS, HEAD_DIM_T, BLOCK_KT, OPERAND)
    K += (h // group).to(tl.int64) * stride_kh
    Kt += (h // group_t).to(tl.int64) * stride_kth
    Slots += i.to(tl.int64) * slots
    row, lanes = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = (h + row).to(tl.int64) * tokens + i
    lse = tl.load(Lse + at, mask=row < HEADS, other=0.0)[:, None]
    lse_t = tl.load(LseT + at, mask=row < HEADS, other=0.0)[:, None]
    shift = tl.load(Shift + at, mask=row < HEADS, other=0.0)[:, None]
    boost = 1.0
    if BOOST:
        boost = tl.load(Boost)
    acc = tl.zeros([ROWS, BLOCK_K], ACC)
    for first in range(0, slots, BLOCK):
        slot = tl.load(Slots + first + lanes, mask=first + lanes < slots, other=-1)
        s, t, keys = sampled_scores(
            q, K, slot, stride_kn,
            SCALE, SOFTCAP, LOG2E, HEAD_DIM, BLOCK_K, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        kt = gather(Kt, slot, slot >= 0, stride_ktn, HEAD_DIM_T, BLOCK_KT, OPERAND)
        zt = tl.dot(qt, tl.trans(kt), input_precision=PRECISION, out_dtype=ACC)
        lq = s - lse
        x = tl.broadcast_to(-shift, lq.shape)
        x, tail = alignment(
            x, 0.0, zt, lq, lse_t, factor, False, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP
        )
        ds = d_scores(tl.exp2(lq), x, tail, t, factor, False, True, DIVERGENCE, SOFTCAP)
        ds = tl.where((slot >= 0)[None, :], ds, 0.0) * boost
        acc = tl.dot(ds.to(OPERAND), keys, acc, input_precision=PRECISION, out_dtype=ACC)
    if BOOST:
        acc = acc * tl.load(Boost + 1)
    k = tl.arange(0, BLOCK_K)
    at = head_at(dQ, i, h, stride_dqn, stride_dqh) + row[:, None] * stride_dqh + k[None, :]
    inside = (row < HEADS)[:, None] & (k < HEAD_DIM)[None, :]
    tl.store(at, (acc * SCALE).to(dQ.dtype.element_ty), mask=inside)


@triton.jit
def sampled_dk_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    Qt,  # [N, H, Kt]
    Kt,  # [N, Jt, Kt]
    First,  # [N + 1]: where a key's queries begin in Queries
    Queries,  # [E], those of one key in their order, all of factor other than 0
    Lse,  # [H, N], base 2
    LseT,  # [H, N], base 2
    Factor,  # [N]
    Shift,  # [H, N]
    dK,  # [N, J, K]
    tokens,
    group,
    group_t,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_qtn,
    stride_qth,
    stride_ktn,
    stride_kth,
    stride_dkn,
    stride_dkh,
    DIVERGENCE: tl.constexpr,
    LOG_ODDS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr,
    ACC: tl.constexpr,
):
    j, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(First + j), tl.load(First + j + 1)
    d, dt, lanes = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_KT), tl.arange(0, BLOCK)
    some = begin < end
    # A key that no query sampled may hold NaN: it is not read.
    key = head_at(K, j, head, stride_kn, stride_kh)
    k = tl.load(key + d, mask=(d < HEAD_DIM) & some, other=0.0).to(ACC)
    acc = tl.zeros([BLOCK_K], ACC)
    for h in range(head * group, head * group + group):
        key_t = head_at(Kt, j, tl.cast(h // group_t, tl.int32), stride_ktn, stride_kth)
        kt = tl.load(key_t + dt, mask=(dt < HEAD_DIM_T) & some, other=0.0).to(ACC)
        per_row = tl.cast(h, tl.int64) * tokens
        head_q = Q + tl.cast(h, tl.int64) * stride_qh
        head_qt = Qt + tl.cast(h, tl.int64) * stride_qth
        for first in range(begin, end, BLOCK):
            inside = first + lanes < end
            i = tl.load(Queries + first + lanes, mask=inside, other=0)
            q = gather(head_q, i, inside, stride_qn, HEAD_DIM, BLOCK_K, ACC)
            qt = gather(head_qt, i, inside, stride_qtn, HEAD_DIM_T, BLOCK_KT, ACC)
            factor = tl.load(Factor + i, mask=inside, other=0.0)
            lse = tl.load(Lse + per_row + i, mask=inside, other=0.0)
            lse_t = tl.load(LseT + per_row + i, mask=inside, other=0.0)
            x = -tl.load(Shift + per_row + i, mask=inside, other=0.0)
            s, t = scores(tl.sum(q * k[None, :], 1), SCALE, SOFTCAP, LOG2E)
            zt = tl.sum(qt * kt[None, :], 1)
            lq = s - lse
            x, tail = alignment(
                x, 0.0, zt, lq, lse_t, factor, False, DIVERGENCE, LOG_ODDS, SCALE_T, SOFTCAP
            )
            # 0 outside, where the factor is.
            ds = d_scores(tl.exp2(lq), x, tail, t, factor, False, True, DIVERGENCE, SOFTCAP)
            acc += tl.sum(ds[:, None] * q, 0)
    at = head_at(dK, j, head, stride_dkn, stride_dkh) + d
    tl.store(at, (acc * SCALE).to(dK.dtype.element_ty), mask=d < HEAD_DIM)
