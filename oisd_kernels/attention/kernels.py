"""Attention forward and the divergence of two attention maps: scores live in registers alone.

    attention_forward_kernel       out and logsumexp; logsumexp alone without V
    attention_statistics_kernel    divergence of a row and head, and what its gradient needs, of
                                   several students: a block of the teacher's scores serves them all
    attention_delta_kernel         rowsum(dO * O), minus the gradient of the logsumexp

A program takes a tile of queries of one sequence and one head (a table made on the device says
which, so tiles never straddle sequences and the host waits for nothing) and walks over the blocks
of keys that its queries see. Blocks that all of them see whole are worked on without masks, the
others in a second loop. Scores are in base 2 where only their exponentials are wanted.

Tokens are counted over the whole pack; i are queries, j keys. Letters: S student layers, N tokens,
H query heads, J key heads, K head dimension, P programs. "Full" blocks need no mask.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes the unpacking of what a kernel's function returns for the unpacking of nothing)

import triton
import triton.language as tl

from oisd_kernels.divergences import log_probability, tanh, terms

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_at(Tiles, t, programs):
    """Begin and end of the tile's sequence, and the tile's first token; begin >= end: no tile."""
    return tl.load(Tiles + t), tl.load(Tiles + programs + t), tl.load(Tiles + 2 * programs + t)


@triton.jit
def head_at(X, row, head, stride_n, stride_h):
    """Address of token `row` of a head; both products may pass 2^31."""
    return X + row.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h


@triton.jit
def layer_at(X, n, stride_s):
    """Address of student layer n; the product may pass 2^31."""
    return X + tl.cast(n, tl.int64) * stride_s


@triton.jit
def load_rows(
    X, rows, stride_n, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_K] from X on, 0 where not in `rows` [BLOCK] (if MASKED) and past HEAD_DIM."""
    k = tl.arange(0, BLOCK_K)
    at = X + tl.arange(0, BLOCK)[:, None] * stride_n + k[None, :]
    if MASKED:
        x = tl.load(at, mask=rows[:, None] & (k < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_K:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(k < HEAD_DIM)[None, :], other=0.0)
    return x.to(OPERAND)


@triton.jit
def product(
    x, y, z, X, rows_x, stride_x, Y, rows_y, stride_y,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T + z. With a DEPTH that many columns at a time, read from X and Y instead of x and y.

    As operands of three tf32 products wide tiles take more registers than there are.
    """
    if DEPTH is None:
        z = tl.dot(x, tl.trans(y), z, input_precision=PRECISION, out_dtype=z.dtype)
    else:
        X += tl.arange(0, z.shape[0])[:, None] * stride_x
        Y += tl.arange(0, z.shape[1])[:, None] * stride_y
        for first in range(0, BLOCK_K, DEPTH):
            k = first + tl.arange(0, DEPTH)[None, :]
            a = tl.load(X + k, mask=rows_x[:, None] & (k < HEAD_DIM), other=0.0).to(OPERAND)
            b = tl.load(Y + k, mask=rows_y[:, None] & (k < HEAD_DIM), other=0.0).to(OPERAND)
            z = tl.dot(a, tl.trans(b), z, input_precision=PRECISION, out_dtype=z.dtype)
    return z


@triton.jit
def store_rows(X, x, rows, stride_n, HEAD_DIM: tl.constexpr):
    k = tl.arange(0, x.shape[1])
    at = X + tl.arange(0, x.shape[0])[:, None] * stride_n + k[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=rows[:, None] & (k < HEAD_DIM)[None, :])


@triton.jit
def scores(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr):
    """Products -> scores times UNIT (log2 e for base 2), and the softcap's tanh."""
    if SOFTCAP is None:
        return z * (SCALE * UNIT), z
    else:
        t = tanh(z * (SCALE / SOFTCAP))
        return t * (SOFTCAP * UNIT), t


@triton.jit
def visible(i, j, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query i sees key j, both of them tokens of the sequence that stops at `end`."""
    seen = (i < end) & (j < end)
    if CAUSAL:
        seen = seen & (j <= i)
    if WINDOW:
        seen = seen & (i - j < window)
        if not CAUSAL:
            seen = seen & (j - i < window)
    return seen


@triton.jit
def keys_of(begin, end, a, b, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that some query of [a, b) sees, and those that all of them see: lo, hi, full lo, hi."""
    lo, hi, full_lo, full_hi = begin, end, begin, end
    if CAUSAL:
        hi = b
        full_hi = a + 1
    if WINDOW:
        lo = tl.maximum(begin, a - window + 1)
        full_lo = tl.maximum(begin, b - window)
        if not CAUSAL:
            hi = tl.minimum(end, b - 1 + window)
            full_hi = tl.minimum(end, a + window)
    return lo, hi, full_lo, full_hi


@triton.jit
def blocks_of(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Blocks from `lo` on: how many, and the bounds of those without mask among them."""
    blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    left = tl.minimum(tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK), blocks)
    right = tl.minimum(tl.maximum(full_hi - lo, 0) // BLOCK, blocks)
    return blocks, left, tl.maximum(right, left)


@triton.jit
def forward_block(
    acc, m, l, q, i, j, end, window, K, V, stride_kn, stride_vn,  # noqa: E741
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_V: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; K and V point to the block."""
    k = load_rows(K, j < end, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    s, _ = scores(z, SCALE, SOFTCAP, LOG2E)
    if MASKED:
        s = tl.where(visible(i[:, None], j[None, :], end, window, CAUSAL, WINDOW), s, -float("inf"))
    largest = tl.maximum(m, tl.max(s, 1))
    # A row that has seen nothing yet: -inf - -inf is NaN.
    base = tl.where(largest == -float("inf"), 0.0, largest)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(p, 1)  # noqa: E741
    if HAS_V:
        v = load_rows(V, j < end, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(OPERAND), v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, largest, l


@triton.jit
def attention_forward_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    V,  # [N, J, K]
    Out,  # [N, H, K]
    Lse,  # [H, N]
    Tiles,  # [3, P]
    tokens,
    group,
    window,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_on,
    stride_oh,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    lanes = tl.arange(0, BLOCK_N)
    q = load_rows(
        head_at(Q, start, h, stride_qn, stride_qh), i < end, stride_qn,
        HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND,
    )  # fmt: skip
    lo, hi, full_lo, full_hi = keys_of(
        begin, end, start, tl.minimum(start + BLOCK_M, end), window, CAUSAL, WINDOW
    )
    blocks, left, right = blocks_of(lo, hi, full_lo, full_hi, BLOCK_N)
    if HAS_V:
        acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    else:
        acc = 0.0
    m = tl.full([BLOCK_M], -float("inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)  # noqa: E741
    for n in range(left, right):
        step = n * BLOCK_N
        acc, m, l = forward_block(  # noqa: E741
            acc, m, l, q, i, lo + step + lanes, end, window,
            head_at(K, lo + step, h // group, stride_kn, stride_kh),
            head_at(V, lo + step, h // group, stride_vn, stride_vh),
            stride_kn, stride_vn, SCALE, SOFTCAP, CAUSAL, WINDOW, HAS_V, HEAD_DIM, BLOCK_N, BLOCK_K,
            OPERAND, ACC, PRECISION, False,
        )  # fmt: skip
    for n in range(0, blocks - (right - left)):
        step = tl.where(n < left, n, n + right - left) * BLOCK_N
        acc, m, l = forward_block(  # noqa: E741
            acc, m, l, q, i, lo + step + lanes, end, window,
            head_at(K, lo + step, h // group, stride_kn, stride_kh),
            head_at(V, lo + step, h // group, stride_vn, stride_vh),
            stride_kn, stride_vn, SCALE, SOFTCAP, CAUSAL, WINDOW, HAS_V, HEAD_DIM, BLOCK_N, BLOCK_K,
            OPERAND, ACC, PRECISION, True,
        )  # fmt: skip
    tl.store(Lse + h.to(tl.int64) * tokens + i, (m + tl.log2(l)) * LN2, mask=i < end)
    if HAS_V:
        out = acc / tl.where(l == 0, 1.0, l)[:, None]
        store_rows(head_at(Out, start, h, stride_on, stride_oh), out, i < end, stride_on, HEAD_DIM)


@triton.jit
def load_lse(Lse, i, mask):
    """A row without keys has -inf, which would make NaN of its differences."""
    lse = tl.load(Lse + i, mask=mask, other=0.0)
    return tl.where(lse == -float("inf"), 0.0, lse)


@triton.jit
def student_block(
    lp, nothing, q, lse, seen, rows, keys, Q, K, stride_qn, stride_kn,
    DEPTH: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A student's terms of value and statistic, [BLOCK_M] each; Q and K point to the tile."""
    k = load_rows(K, keys, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
    z = product(
        q, k, nothing, Q, rows, stride_qn, K, keys, stride_kn,
        HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    s, _ = scores(z, SCALE, SOFTCAP, 1.0)
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    term, inner, p = terms(
        lp, log_probability(s, lse[:, None]), DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA
    )
    if DIVERGENCE == "reverse_kl":
        inner = -inner
    return tl.sum(term, 1), tl.sum(p * inner, 1)


@triton.jit
def statistics_block(
    value, statistic, q, qt, lse, lse_t, i, rows, j, end, window,
    Q, Qt, Lse, students, layer, stride_qs, stride_qn, stride_qtn,
    K, Kt, stride_ks, stride_kn, stride_ktn,
    STUDENTS: tl.constexpr, DEPTH: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr,
    LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the terms of a block of keys; K and Kt point to it, Q, Qt, Lse to the rows.

    The block of the teacher's scores serves all students: one, whose rows are at hand, or several,
    whose rows are read again for each block.
    """
    keys = j < end
    nothing = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    kt = load_rows(Kt, keys, stride_ktn, HEAD_DIM_T, BLOCK_N, BLOCK_KT, MASKED, OPERAND)
    zt = product(
        qt, kt, nothing, Qt, rows, stride_qtn, Kt, keys, stride_ktn,
        HEAD_DIM_T, BLOCK_KT, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    st, _ = scores(zt, SCALE_T, SOFTCAP, 1.0)
    seen = True
    if MASKED:
        seen = visible(i[:, None], j[None, :], end, window, CAUSAL, WINDOW)
        st = tl.where(seen, st, -float("inf"))
    lp = log_probability(st, lse_t[:, None])
    if STUDENTS == 1:
        a, b = student_block(
            lp, nothing, q, lse, seen, rows, keys, Q, K, stride_qn, stride_kn,
            DEPTH, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N,
            BLOCK_K, OPERAND, PRECISION, MASKED,
        )  # fmt: skip
        value += a
        statistic += b
    else:
        place = tl.arange(0, STUDENTS)[None, :]
        for n in range(0, students):
            own = layer_at(Q, n, stride_qs)
            q = load_rows(own, rows, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
            lse = load_lse(Lse + n * layer, tl.arange(0, BLOCK_M), rows)
            a, b = student_block(
                lp, nothing, q, lse, seen, rows, keys, own, layer_at(K, n, stride_ks), stride_qn,
                stride_kn, DEPTH, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA, SCALE, SOFTCAP, HEAD_DIM,
                BLOCK_N, BLOCK_K, OPERAND, PRECISION, MASKED,
            )  # fmt: skip
            value += tl.where(place == n, a[:, None], 0.0)
            statistic += tl.where(place == n, b[:, None], 0.0)
    return value, statistic


@triton.jit
def attention_statistics_kernel(
    Q,  # [S, N, H, K]
    K,  # [S, N, J, K]
    Qt,  # [N, H, Kt]: teacher
    Kt,  # [N, Jt, Kt]
    Lse,  # [S, H, N]
    LseT,  # [H, N]
    Keep,  # [N]
    Value,  # [S, H, N]
    Statistic,  # [S, H, N]
    Tiles,  # [3, P]
    students,  # S, at most STUDENTS
    tokens,
    group,
    group_t,
    window,
    stride_qs,
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_qtn,
    stride_qth,
    stride_ktn,
    stride_kth,
    HAS_KEEP: tl.constexpr,
    STUDENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr,
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
    begin, end, start = tile_at(Tiles, programs - 1 - tl.program_id(0), programs)
    if start >= end:
        return
    h = tl.program_id(1)
    i = start + tl.arange(0, BLOCK_M)
    rows = i < end
    a, b = start, tl.minimum(start + BLOCK_M, end)
    per_row = h.to(tl.int64) * tokens
    if HAS_KEEP:
        rows = tl.load(Keep + i, mask=rows, other=0) != 0
        a = tl.min(tl.where(rows, i, end), 0)
        b = tl.max(tl.where(rows, i + 1, begin), 0)
    layer = tl.num_programs(1).to(tl.int64) * tokens
    value = tl.zeros([BLOCK_M], ACC)
    if STUDENTS > 1:
        value = tl.zeros([BLOCK_M, STUDENTS], ACC)
    statistic = value
    if a < b:
        lanes = tl.arange(0, BLOCK_N)
        Q = head_at(Q, start, h, stride_qn, stride_qh)
        Qt = head_at(Qt, start, h, stride_qtn, stride_qth)
        Lse += per_row + start
        qt = load_rows(Qt, rows, stride_qtn, HEAD_DIM_T, BLOCK_M, BLOCK_KT, True, OPERAND)
        lse_t = load_lse(LseT + per_row, i, rows)
        q, lse = qt, lse_t
        if STUDENTS == 1:
            q = load_rows(Q, rows, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
            lse = load_lse(Lse, tl.arange(0, BLOCK_M), rows)
        lo, hi, full_lo, full_hi = keys_of(begin, end, a, b, window, CAUSAL, WINDOW)
        blocks, left, right = blocks_of(lo, hi, full_lo, full_hi, BLOCK_N)
        for n in range(left, right):
            step = n * BLOCK_N
            value, statistic = statistics_block(
                value, statistic, q, qt, lse, lse_t, i, rows, lo + step + lanes, end, window,
                Q, Qt, Lse, students, layer, stride_qs, stride_qn, stride_qtn,
                head_at(K, lo + step, h // group, stride_kn, stride_kh),
                head_at(Kt, lo + step, h // group_t, stride_ktn, stride_kth),
                stride_ks, stride_kn, stride_ktn, STUDENTS, DEPTH, DIVERGENCE, BETA, LOG_BETA,
                LOG_1M_BETA, SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M,
                BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, False,
            )  # fmt: skip
        for n in range(0, blocks - (right - left)):
            step = tl.where(n < left, n, n + right - left) * BLOCK_N
            value, statistic = statistics_block(
                value, statistic, q, qt, lse, lse_t, i, rows, lo + step + lanes, end, window,
                Q, Qt, Lse, students, layer, stride_qs, stride_qn, stride_qtn,
                head_at(K, lo + step, h // group, stride_kn, stride_kh),
                head_at(Kt, lo + step, h // group_t, stride_ktn, stride_kth),
                stride_ks, stride_kn, stride_ktn, STUDENTS, DEPTH, DIVERGENCE, BETA, LOG_BETA,
                LOG_1M_BETA, SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M,
                BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, True,
            )  # fmt: skip
    at = per_row + i
    inside = i < end
    if STUDENTS > 1:
        place = tl.arange(0, STUDENTS)[None, :]
        at = place * layer + at[:, None]
        inside = inside[:, None] & (place < students)
        rows = rows[:, None]
    tl.store(Value + at, tl.where(rows, value, 0.0), mask=inside)
    if DIVERGENCE != "forward_kl":
        tl.store(Statistic + at, tl.where(rows, statistic, 0.0), mask=inside)


@triton.jit
def attention_delta_kernel(
    Out,  # [N, H, K]
    dOut,  # [N, H, K]
    dLse,  # [H, N]
    Delta,  # [H, N]
    tokens,
    stride_on,
    stride_oh,
    stride_don,
    stride_doh,
    HAS_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    start, h = tl.program_id(0) * BLOCK, tl.program_id(1)
    i = start + tl.arange(0, BLOCK)
    rows = i < tokens
    out = load_rows(
        head_at(Out, start, h, stride_on, stride_oh), rows, stride_on,
        HEAD_DIM, BLOCK, BLOCK_K, True, ACC,
    )  # fmt: skip
    d_out = load_rows(
        head_at(dOut, start, h, stride_don, stride_doh), rows, stride_don,
        HEAD_DIM, BLOCK, BLOCK_K, True, ACC,
    )  # fmt: skip
    delta = tl.sum(out * d_out, 1)
    at = h.to(tl.int64) * tokens + i
    if HAS_LSE:
        delta -= tl.load(dLse + at, mask=rows, other=0.0).to(ACC)
    tl.store(Delta + at, delta, mask=rows)
