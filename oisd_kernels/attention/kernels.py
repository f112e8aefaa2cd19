"""Forward kernels of attention and of the divergence of two attention maps.

    attention_forward_kernel       out = softmax(s) V and lse = logsumexp(s); lse alone without V
    attention_statistics_kernel    divergence of each row and head, and the statistic that its
                                   gradient needs, for several students against one teacher
    attention_delta_kernel         delta = rowsum(dO * O) - dLse

with s = scale * q k^T, or softcap * tanh(scale * q k^T / softcap). The online softmax keeps, for
each query, the maximum m of the scores so far and l = sum_j 2^(s_j - m), with scores in base 2
(times log2 e): lse = (m + log2 l) ln 2. The statistics need natural logarithms. With `term` and
`inner` of `oisd_kernels.divergences` and p the student's probability, value = sum_j term_j and
statistic = sum_j p_j inner_j, minus that for the reverse KL. Scores are never stored in memory.

A program takes BLOCK_M queries of one sequence and one head, and loops over the blocks of BLOCK_N
keys that these queries see. A table built on the device lists the tiles, so tiles never cross
sequences and the host does not wait. Blocks that every query of the tile sees as a whole ("full"
blocks) need no mask and have a loop of their own; a second loop takes the others.

Names: i queries and j keys, counted over the whole pack; in_i, in_j masks of valid ones; p_ block
of pointers; o_ offset; z raw products, s scores. The suffix t is the teacher's. S student layers,
N tokens, H query heads, J key heads, K head dimension, P programs (tiles). Head h reads key head
h // group. BLOCK_K is HEAD_DIM rounded up to a power of two; columns from HEAD_DIM on hold 0.
"""

# pyright: reportGeneralTypeIssues=false
# (pyright believes that a jitted function returns None, which cannot be unpacked)

import triton
import triton.language as tl

from oisd_kernels.divergences import log_probability, tanh, terms

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_at(Tiles, t, programs):
    """Begin and end of tile t's sequence, and the tile's first token; start >= end: no tile."""
    return tl.load(Tiles + t), tl.load(Tiles + programs + t), tl.load(Tiles + 2 * programs + t)


@triton.jit
def head_at(X, token, head, stride_n, stride_h):
    """Address of `token` in `head`; int64, since both products may exceed 2^31."""
    return X + token.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h


@triton.jit
def layer_at(X, layer, stride_s):
    """Address of a student layer; int64, since the product may exceed 2^31."""
    return X + tl.cast(layer, tl.int64) * stride_s


@triton.jit
def load_rows(
    X, in_rows, stride_n, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Loads [BLOCK, BLOCK_K] from X, 0 from HEAD_DIM on and, if MASKED, where not in_rows."""
    # [BLOCK_K]
    o_k = tl.arange(0, BLOCK_K)
    # [BLOCK, BLOCK_K]
    p_x = X + tl.arange(0, BLOCK)[:, None] * stride_n + o_k[None, :]
    if MASKED:
        x = tl.load(p_x, mask=in_rows[:, None] & (o_k < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_K:
        x = tl.load(p_x)
    else:
        x = tl.load(p_x, mask=(o_k < HEAD_DIM)[None, :], other=0.0)
    return x.to(OPERAND)


@triton.jit
def product(
    x, y, z, X, in_x, stride_x, Y, in_y, stride_y,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z [ROWS, COLUMNS] + x [ROWS, BLOCK_K] times y [COLUMNS, BLOCK_K] transposed.

    With a DEPTH, DEPTH columns at a time are read from X and Y, and x and y are not used: as
    operands of tf32x3 products (three for one in fp32), wide tiles need more registers than exist.
    """
    if DEPTH is None:
        z = tl.dot(x, tl.trans(y), z, input_precision=PRECISION, out_dtype=z.dtype)
    else:
        # [ROWS, 1] and [COLUMNS, 1]
        X += tl.arange(0, z.shape[0])[:, None] * stride_x
        Y += tl.arange(0, z.shape[1])[:, None] * stride_y
        for start in range(0, BLOCK_K, DEPTH):
            # [1, DEPTH]
            o_k = start + tl.arange(0, DEPTH)[None, :]
            # [ROWS, DEPTH]
            x_part = tl.load(X + o_k, mask=in_x[:, None] & (o_k < HEAD_DIM), other=0.0).to(OPERAND)
            # [COLUMNS, DEPTH]
            y_part = tl.load(Y + o_k, mask=in_y[:, None] & (o_k < HEAD_DIM), other=0.0).to(OPERAND)
            z = tl.dot(x_part, tl.trans(y_part), z, input_precision=PRECISION, out_dtype=z.dtype)
    return z


@triton.jit
def store_rows(X, x, in_rows, stride_n, HEAD_DIM: tl.constexpr):
    """Stores x [BLOCK, BLOCK_K] at X, in X's dtype."""
    o_k = tl.arange(0, x.shape[1])
    p_x = X + tl.arange(0, x.shape[0])[:, None] * stride_n + o_k[None, :]
    tl.store(p_x, x.to(X.dtype.element_ty), mask=in_rows[:, None] & (o_k < HEAD_DIM)[None, :])


@triton.jit
def scores(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr):
    """Scores of the raw products z, times UNIT (LOG2E for base 2), and the softcap's tanh."""
    if SOFTCAP is None:
        return z * (SCALE * UNIT), z
    else:
        tanh_z = tanh(z * (SCALE / SOFTCAP))
        return tanh_z * (SOFTCAP * UNIT), tanh_z


@triton.jit
def visible(i, j, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query i sees key j, in the sequence that ends before token `end`; broadcasts."""
    mask = (i < end) & (j < end)
    if CAUSAL:
        mask = mask & (j <= i)
    if WINDOW:
        mask = mask & (i - j < window)
        if not CAUSAL:
            mask = mask & (j - i < window)
    return mask


@triton.jit
def keys_of(begin, end, i_begin, i_end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [lo, hi) that some query of [i_begin, i_end) sees; all see [full_lo, full_hi)."""
    lo, hi, full_lo, full_hi = begin, end, begin, end
    if CAUSAL:
        hi = i_end
        full_hi = i_begin + 1
    if WINDOW:
        lo = tl.maximum(begin, i_begin - window + 1)
        full_lo = tl.maximum(begin, i_end - window)
        if not CAUSAL:
            hi = tl.minimum(end, i_end - 1 + window)
            full_hi = tl.minimum(end, i_begin + window)
    return lo, hi, full_lo, full_hi


@triton.jit
def blocks_of(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """How many blocks cover [lo, hi), and which of them, [full_begin, full_end), need no mask."""
    blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK), blocks)
    full_end = tl.minimum(tl.maximum(full_hi - lo, 0) // BLOCK, blocks)
    return blocks, full_begin, tl.maximum(full_end, full_begin)


@triton.jit
def forward_block(
    acc, m, l, q, i, j, end, window, K, V, stride_kn, stride_vn,  # noqa: E741
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_V: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; K and V point to the block's first key.

    acc [BLOCK_M, BLOCK_K] = sum_j 2^(s_j - m) v_j; m and l [BLOCK_M] as in the module's docstring.
    """
    # [BLOCK_N, BLOCK_K]
    k = load_rows(K, j < end, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
    # [BLOCK_M, BLOCK_N]
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    s, _ = scores(z, SCALE, SOFTCAP, LOG2E)
    if MASKED:
        s = tl.where(visible(i[:, None], j[None, :], end, window, CAUSAL, WINDOW), s, -float("inf"))
    # [BLOCK_M]
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s - m_safe[:, None])
    # [BLOCK_M]: brings what was summed so far from the old maximum to the new
    rescale = tl.exp2(m - m_safe)
    l = l * rescale + tl.sum(p, 1)  # noqa: E741
    if HAS_V:
        # [BLOCK_N, BLOCK_K]
        v = load_rows(V, j < end, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
        # Rescaled on its own line, so that the dot can add to acc in place.
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(OPERAND), v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, m_new, l


@triton.jit
def attention_forward_kernel(
    Q,  # [N, H, K]
    K,  # [N, J, K]
    V,  # [N, J, K]
    Sink,  # [H], or None
    Out,  # [N, H, K]
    Lse,  # [H, N], over the keys
    Tiles,  # [3, P]
    tokens, group, window,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_V: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    # Under a causal mask the last tiles see the most keys, so they start first.
    begin, end, start = tile_at(Tiles, programs - 1 - tl.program_id(0), programs)
    if start >= end:
        return
    h = tl.program_id(1)
    # [BLOCK_M]: queries
    i = start + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    # [BLOCK_M, BLOCK_K]
    q = load_rows(
        head_at(Q, start, h, stride_qn, stride_qh), i < end, stride_qn,
        HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND,
    )  # fmt: skip
    lo, hi, full_lo, full_hi = keys_of(
        begin, end, start, tl.minimum(start + BLOCK_M, end), window, CAUSAL, WINDOW
    )
    blocks, full_begin, full_end = blocks_of(lo, hi, full_lo, full_hi, BLOCK_N)
    if HAS_V:
        acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    else:
        acc = 0.0
    m = tl.full([BLOCK_M], -float("inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)  # noqa: E741
    # Full blocks, without a mask
    for block in range(full_begin, full_end):
        o_block = block * BLOCK_N
        acc, m, l = forward_block(  # noqa: E741
            acc, m, l, q, i, lo + o_block + o_n, end, window,
            head_at(K, lo + o_block, h // group, stride_kn, stride_kh),
            head_at(V, lo + o_block, h // group, stride_vn, stride_vh),
            stride_kn, stride_vn, SCALE, SOFTCAP, CAUSAL, WINDOW, HAS_V, HEAD_DIM, BLOCK_N, BLOCK_K,
            OPERAND, ACC, PRECISION, False,
        )  # fmt: skip
    # The blocks before and after the full ones, masked
    for block in range(0, blocks - (full_end - full_begin)):
        o_block = tl.where(block < full_begin, block, block + full_end - full_begin) * BLOCK_N
        acc, m, l = forward_block(  # noqa: E741
            acc, m, l, q, i, lo + o_block + o_n, end, window,
            head_at(K, lo + o_block, h // group, stride_kn, stride_kh),
            head_at(V, lo + o_block, h // group, stride_vn, stride_vh),
            stride_kn, stride_vn, SCALE, SOFTCAP, CAUSAL, WINDOW, HAS_V, HEAD_DIM, BLOCK_N, BLOCK_K,
            OPERAND, ACC, PRECISION, True,
        )  # fmt: skip
    tl.store(Lse + h.to(tl.int64) * tokens + i, (m + tl.log2(l)) * LN2, mask=i < end)
    if HAS_V:
        if Sink is not None:  # after the keys, so that P's range does not depend on it
            own = tl.exp2(tl.load(Sink + h) * LOG2E - m)
            l = l + tl.where(l == 0, 0.0, own)  # noqa: E741
        # A row without keys has l = 0: its output is 0, its lse -inf.
        out = acc / tl.where(l == 0, 1.0, l)[:, None]
        store_rows(head_at(Out, start, h, stride_on, stride_oh), out, i < end, stride_on, HEAD_DIM)


@triton.jit
def load_lse(Lse, i, in_i):
    """Logsumexps [len(i)]; 0 instead of a row without keys' -inf, since -inf - -inf is NaN."""
    lse = tl.load(Lse + i, mask=in_i, other=0.0)
    return tl.where(lse == -float("inf"), 0.0, lse)


@triton.jit
def student_block(
    lp, zero, q, lse, mask, in_i, in_j, Q, K, stride_qn, stride_kn,
    DEPTH: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """What a block of keys adds to one student's value and statistic, [BLOCK_M] each.

    lp [BLOCK_M, BLOCK_N] is the teacher's log-probability; Q and K point to the rows and keys.
    """
    # [BLOCK_N, BLOCK_K]
    k = load_rows(K, in_j, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_K, MASKED, OPERAND)
    # [BLOCK_M, BLOCK_N]
    z = product(
        q, k, zero, Q, in_i, stride_qn, K, in_j, stride_kn,
        HEAD_DIM, BLOCK_K, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    s, _ = scores(z, SCALE, SOFTCAP, 1.0)
    if MASKED:
        s = tl.where(mask, s, -float("inf"))
    # [BLOCK_M, BLOCK_N] each; p is the student's probability
    term, inner, p = terms(
        lp, log_probability(s, lse[:, None]), DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA
    )
    if DIVERGENCE == "reverse_kl":
        inner = -inner
    return tl.sum(term, 1), tl.sum(p * inner, 1)


@triton.jit
def statistics_block(
    value, statistic, q, qt, lse, lse_t, i, in_i, j, end, window, Q, Qt, Lse, students, stride_lse,
    stride_qs, stride_qn, stride_qtn, K, Kt, stride_ks, stride_kn, stride_ktn,
    STUDENTS: tl.constexpr, DEPTH: tl.constexpr, DIVERGENCE: tl.constexpr, BETA: tl.constexpr,
    LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr, SCALE: tl.constexpr, SCALE_T: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_KT: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a block of keys to value and statistic, [BLOCK_M] or [BLOCK_M, STUDENTS].

    K and Kt point to the block's first key; Q, Qt and Lse to the tile's first row. All students use
    the same block of the teacher's scores. A single student's rows q stay in registers; the rows of
    several students are read again for each block.
    """
    in_j = j < end
    zero = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    # [BLOCK_N, BLOCK_KT]
    kt = load_rows(Kt, in_j, stride_ktn, HEAD_DIM_T, BLOCK_N, BLOCK_KT, MASKED, OPERAND)
    # [BLOCK_M, BLOCK_N]
    zt = product(
        qt, kt, zero, Qt, in_i, stride_qtn, Kt, in_j, stride_ktn,
        HEAD_DIM_T, BLOCK_KT, DEPTH, OPERAND, PRECISION,
    )  # fmt: skip
    st, _ = scores(zt, SCALE_T, SOFTCAP, 1.0)
    mask = True
    if MASKED:
        mask = visible(i[:, None], j[None, :], end, window, CAUSAL, WINDOW)
        st = tl.where(mask, st, -float("inf"))
    # [BLOCK_M, BLOCK_N]
    lp = log_probability(st, lse_t[:, None])
    if STUDENTS == 1:
        value_s, statistic_s = student_block(
            lp, zero, q, lse, mask, in_i, in_j, Q, K, stride_qn, stride_kn,
            DEPTH, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N,
            BLOCK_K, OPERAND, PRECISION, MASKED,
        )  # fmt: skip
        value += value_s
        statistic += statistic_s
    else:
        # [1, STUDENTS]
        o_s = tl.arange(0, STUDENTS)[None, :]
        for student in range(0, students):
            Q_s = layer_at(Q, student, stride_qs)
            # [BLOCK_M, BLOCK_K]
            q = load_rows(Q_s, in_i, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
            # [BLOCK_M]
            lse = load_lse(Lse + student * stride_lse, tl.arange(0, BLOCK_M), in_i)
            value_s, statistic_s = student_block(
                lp, zero, q, lse, mask, in_i, in_j, Q_s, layer_at(K, student, stride_ks), stride_qn,
                stride_kn, DEPTH, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA, SCALE, SOFTCAP, HEAD_DIM,
                BLOCK_N, BLOCK_K, OPERAND, PRECISION, MASKED,
            )  # fmt: skip
            # Column `student` of the sums: a register tile cannot be indexed by a variable.
            value += tl.where(o_s == student, value_s[:, None], 0.0)
            statistic += tl.where(o_s == student, statistic_s[:, None], 0.0)
    return value, statistic


@triton.jit
def attention_statistics_kernel(
    Q,  # [S, N, H, K]
    K,  # [S, N, J, K]
    Qt,  # [N, H, Kt]: teacher
    Kt,  # [N, Jt, Kt]
    Lse,  # [S, H, N]
    LseT,  # [H, N]
    Keep,  # [N]: 0 for rows to leave out
    Value,  # [S, H, N]
    Statistic,  # [S, H, N]
    Tiles,  # [3, P]
    students,  # S, at most STUDENTS
    tokens, group, group_t, window,
    stride_qs, stride_qn, stride_qh, stride_ks, stride_kn, stride_kh, stride_qtn, stride_qth,
    stride_ktn, stride_kth,
    HAS_KEEP: tl.constexpr, STUDENTS: tl.constexpr, DEPTH: tl.constexpr, DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr, SCALE: tl.constexpr,
    SCALE_T: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_KT: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    begin, end, start = tile_at(Tiles, programs - 1 - tl.program_id(0), programs)
    if start >= end:
        return
    h = tl.program_id(1)
    # [BLOCK_M]: queries; in_i those whose statistics are wanted
    i = start + tl.arange(0, BLOCK_M)
    in_i = i < end
    i_begin, i_end = start, tl.minimum(start + BLOCK_M, end)
    o_head = h.to(tl.int64) * tokens
    if HAS_KEEP:
        in_i = tl.load(Keep + i, mask=in_i, other=0) != 0
        # Only keys that a wanted row sees are read.
        i_begin = tl.min(tl.where(in_i, i, end), 0)
        i_end = tl.max(tl.where(in_i, i + 1, begin), 0)
    stride_lse = tl.num_programs(1).to(tl.int64) * tokens
    # [BLOCK_M], or [BLOCK_M, STUDENTS]; Triton wants a power of two
    value = tl.zeros([BLOCK_M], ACC)
    if STUDENTS > 1:
        value = tl.zeros([BLOCK_M, STUDENTS], ACC)
    statistic = value
    if i_begin < i_end:
        o_n = tl.arange(0, BLOCK_N)
        Q = head_at(Q, start, h, stride_qn, stride_qh)
        Qt = head_at(Qt, start, h, stride_qtn, stride_qth)
        Lse += o_head + start
        # [BLOCK_M, BLOCK_KT]
        qt = load_rows(Qt, in_i, stride_qtn, HEAD_DIM_T, BLOCK_M, BLOCK_KT, True, OPERAND)
        # [BLOCK_M]
        lse_t = load_lse(LseT + o_head, i, in_i)
        # Not used with several students, but a loop's variables need a value.
        q, lse = qt, lse_t
        if STUDENTS == 1:
            # [BLOCK_M, BLOCK_K]
            q = load_rows(Q, in_i, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_K, True, OPERAND)
            lse = load_lse(Lse, tl.arange(0, BLOCK_M), in_i)
        lo, hi, full_lo, full_hi = keys_of(begin, end, i_begin, i_end, window, CAUSAL, WINDOW)
        blocks, full_begin, full_end = blocks_of(lo, hi, full_lo, full_hi, BLOCK_N)
        # Full blocks, without a mask
        for block in range(full_begin, full_end):
            o_block = block * BLOCK_N
            value, statistic = statistics_block(
                value, statistic, q, qt, lse, lse_t, i, in_i, lo + o_block + o_n, end, window,
                Q, Qt, Lse, students, stride_lse, stride_qs, stride_qn, stride_qtn,
                head_at(K, lo + o_block, h // group, stride_kn, stride_kh),
                head_at(Kt, lo + o_block, h // group_t, stride_ktn, stride_kth),
                stride_ks, stride_kn, stride_ktn, STUDENTS, DEPTH, DIVERGENCE, BETA, LOG_BETA,
                LOG_1M_BETA, SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M,
                BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, False,
            )  # fmt: skip
        # The blocks before and after the full ones, masked
        for block in range(0, blocks - (full_end - full_begin)):
            o_block = tl.where(block < full_begin, block, block + full_end - full_begin) * BLOCK_N
            value, statistic = statistics_block(
                value, statistic, q, qt, lse, lse_t, i, in_i, lo + o_block + o_n, end, window,
                Q, Qt, Lse, students, stride_lse, stride_qs, stride_qn, stride_qtn,
                head_at(K, lo + o_block, h // group, stride_kn, stride_kh),
                head_at(Kt, lo + o_block, h // group_t, stride_ktn, stride_kth),
                stride_ks, stride_kn, stride_ktn, STUDENTS, DEPTH, DIVERGENCE, BETA, LOG_BETA,
                LOG_1M_BETA, SCALE, SCALE_T, SOFTCAP, CAUSAL, WINDOW, HEAD_DIM, HEAD_DIM_T, BLOCK_M,
                BLOCK_N, BLOCK_K, BLOCK_KT, OPERAND, ACC, PRECISION, True,
            )  # fmt: skip
    # [BLOCK_M], or [BLOCK_M, STUDENTS] below
    o_out = o_head + i
    in_out = i < end
    if STUDENTS > 1:
        o_s = tl.arange(0, STUDENTS)[None, :]
        o_out = o_s * stride_lse + o_out[:, None]
        in_out = in_out[:, None] & (o_s < students)
        in_i = in_i[:, None]
    tl.store(Value + o_out, tl.where(in_i, value, 0.0), mask=in_out)
    if DIVERGENCE != "forward_kl":
        tl.store(Statistic + o_out, tl.where(in_i, statistic, 0.0), mask=in_out)


@triton.jit
def attention_delta_kernel(
    Out,  # [N, H, K]
    dOut,  # [N, H, K]
    dLse,  # [H, N]
    Delta,  # [H, N]
    tokens,
    stride_on, stride_oh, stride_don, stride_doh,
    HAS_LSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    start, h = tl.program_id(0) * BLOCK, tl.program_id(1)
    i = start + tl.arange(0, BLOCK)
    in_i = i < tokens
    # [BLOCK, BLOCK_K] each
    out = load_rows(
        head_at(Out, start, h, stride_on, stride_oh), in_i, stride_on,
        HEAD_DIM, BLOCK, BLOCK_K, True, ACC,
    )  # fmt: skip
    d_out = load_rows(
        head_at(dOut, start, h, stride_don, stride_doh), in_i, stride_don,
        HEAD_DIM, BLOCK, BLOCK_K, True, ACC,
    )  # fmt: skip
    # [BLOCK]
    delta = tl.sum(out * d_out, 1)
    o_delta = h.to(tl.int64) * tokens + i
    if HAS_LSE:
        delta -= tl.load(dLse + o_delta, mask=in_i, other=0.0).to(ACC)
    tl.store(Delta + o_delta, delta, mask=in_i)
