"""Row kernels of a chunk that read each logit from memory once: one launch, in three stages a row.

    statistics  largest score and sums of each part of a row       of final rows and student rows
    terms       the divergence, and <q, inner>                     of student rows
    gradient    factor * q * (<q, inner> - inner)

A program does one stage of one part, PART columns, of a row. Its sums are put down, and the last
program of the row and stage to arrive adds up all parts, in their order, so that results do not
depend on who that was. A stage follows the one before by LAG tokens: then the logits are still in
the second-level cache, and what the stage needs was ready some time ago. `rows_triton` instead
takes a row from end to end in one program, hundreds of rows at a time, which no cache holds.

Bytes of a pair of logits, S = 1, in half precision, with the matmuls that write the logits and read
the gradient: 8 + 8 + 2 + 2 = 20, where `rows_triton` moves 36. Both read 24 bytes through the
second-level cache. As compiled for sm_90, a pair takes 157 instructions here and 153 there, beside
those of a program's start and end. So only memory is relieved; docs/gpu.md has the prediction. Sums
of parts and counts are 2 KB a token, beside 1.2 MB of logits, and stay in the cache.

**Waiting.** Programs take numbers as they start, and their work follows from the number. They wait
for programs with lower numbers only. Those have started, so the one with the lowest number among
those that have not ended waits for nothing. No launch can block, whatever else the device runs and
however few programs it holds at once. In the interpreter, which runs one program after the other,
any other wait would never end. Sums are handed on as in a look-back scan (Merrill and Garland
2016): a program stores them, then a barrier and an atomic addition that releases them; who needs
them acquires them with an atomic operation, before a barrier.

**Where the gradient goes.** In its own dtype it overwrites the logits. A row's gradient in half
precision would lie in the first half of its logits' memory, which other programs of the row have
yet to read. It goes over the logits `spare` rows further on instead. These have had their turn: the
launch goes from the last token to the first. The last rows' gradient goes to `spare` rows of memory
behind the logits, which are 1 % of a chunk.

A chunk is one launch. Groups of rows that the cache holds, with a launch for each stage, would be
160 launches for 1,024 tokens of Qwen3: each about 5 us long on an H200, and 1 to 2 us to begin.

Letters: S student layers, C tokens, R student rows, V vocabulary, K parts of a row.
"""

# pyright: reportGeneralTypeIssues=false
# (pyright believes that a jitted function returns None, which cannot be unpacked)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oisd_kernels.divergences import log1p_exp_neg, log_probability, terms
from oisd_kernels.lens.chunked.rows import FinalRows, RowMath, StudentRows
from oisd_kernels.lens.chunked.rows_triton import (
    divergence_constants,
    load_scores,
    power_of_two,
    row_statistics,
    score_constants,
)

PART, BLOCK, WARPS = 8192, 1024, 8
REGISTERS = 64  # at most, for NVIDIA: without a limit ptxas spills a few for a fifth block
CACHE_SHARE = 0.4  # of the second-level cache for logits between two stages; it may hold them twice
CACHE_BYTES = 60 << 20  # where there is no GPU to ask: an H200's
LAG: int | None = None  # tokens between two stages; None: what the cache holds
STATISTICS, SUMS = 5, 4  # numbers of a part
LARGEST_VOCABULARY = 1 << 24  # a float32 holds each of its tokens
LOWEST = tl.constexpr(-1e30)  # of a score in a sum: finite, and many can be added up
NOWHERE = tl.constexpr(2147483647)


# Counts and numbers of parts


@triton.jit
def arrive(Count):
    """Makes what this program has stored visible; how many have arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(Count, 1, sem="acq_rel")


@triton.jit
def wait(Count, K):
    """Until the last of K programs has put down what it made of all parts."""
    while tl.atomic_add(Count, 0, sem="acquire") <= K:
        pass


@triton.jit
def load_parts(Parts, number, K, other, PARTS: tl.constexpr):
    """One number of all parts, [PARTS], past the first-level cache, which may hold an old one."""
    k = tl.arange(0, PARTS)
    return tl.load(Parts + number * K + k, mask=k < K, other=other, cache_modifier=".cg")


@triton.jit
def load_number(Number):
    return tl.load(Number, cache_modifier=".cg")


# The stages


@triton.jit
def store_statistics(
    Z, Bias, Parts, label, part, V, stride, K,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LABELS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Those of a row that consists of the part alone."""
    first = part * PART
    size = tl.minimum(V - first, PART)
    largest, entropy, token, top_logprob, log_others = row_statistics(
        Z + first, Bias + first if HAS_BIAS else Bias, size, stride - first, label - first,
        TEMPERATURE, SOFTCAP, HAS_BIAS, BLOCK,
    )  # fmt: skip
    Parts += part
    tl.store(Parts, largest)
    tl.store(Parts + K, -top_logprob)
    tl.store(Parts + 2 * K, entropy)
    tl.store(Parts + 3 * K, (first + token).to(largest.dtype))
    if HAS_LABELS:
        tl.store(Parts + 4 * K, log_others)


@triton.jit
def join_statistics(Parts, Numbers, K, HAS_LABELS: tl.constexpr, PARTS: tl.constexpr):
    """Those of a row, from its parts: largest score, entropy, likeliest token (first of equals),
    logarithms of the sum of e^(z - largest score) and of that sum without the label.

    Puts down what the other stages need. With w the probability of a part, the entropy is the sum
    of w (its entropy - log w).
    """
    # [PARTS]
    largest = load_parts(Parts, 0, K, LOWEST, PARTS)
    log_total = load_parts(Parts, 1, K, 0.0, PARTS)
    entropy = load_parts(Parts, 2, K, 0.0, PARTS)
    token = load_parts(Parts, 3, K, NOWHERE, PARTS)
    log_others = load_parts(Parts, 4, K, 0.0, PARTS) if HAS_LABELS else log_total
    row_max = tl.max(largest, 0)
    token = tl.min(tl.where(largest == row_max, token, NOWHERE), 0).to(tl.int32)
    difference = largest - row_max
    row_total = tl.log(tl.sum(tl.exp(difference + log_total), 0))
    row_others = tl.log(tl.sum(tl.exp(difference + log_others), 0))
    log_w = difference + log_total - row_total
    entropy = tl.sum(tl.exp(log_w) * (entropy - log_w), 0)
    tl.store(Numbers, row_max)
    tl.store(Numbers + 1, row_total)
    return row_max, entropy, token, row_total, row_others


@triton.jit
def store_terms(
    Z, ZFinal, Bias, Sums, max_p, log_p, max_q, log_q, part, V, stride_z, stride_f, K,
    DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, SCALED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a part: the divergence, <q, inner>, the sum of q, and the largest |q * inner|."""
    # Of each lane, [BLOCK]
    loss = tl.zeros([BLOCK], max_p.dtype)
    q_inner = tl.zeros([BLOCK], max_p.dtype)
    q_sum = tl.zeros([BLOCK], max_p.dtype)
    q_inner_max = tl.zeros([BLOCK], max_p.dtype)
    for start in range(part * PART, tl.minimum(V, (part + 1) * PART), BLOCK):
        v = start + tl.arange(0, BLOCK)
        zq, _ = load_scores(Z, Bias, v, V, stride_z, TEMPERATURE, SOFTCAP, HAS_BIAS)
        zp, _ = load_scores(ZFinal, Bias, v, V, stride_f, TEMPERATURE, SOFTCAP, HAS_BIAS)
        # [BLOCK], like the terms
        lp, lq = log_probability(zp - max_p, log_p), log_probability(zq - max_q, log_q)
        term, inner, q = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
        loss += term
        if CENTRED:
            q_inner += q * inner
            q_sum += q
            if SCALED:
                q_inner_max = tl.maximum(q_inner_max, tl.abs(q * inner))
    tl.store(Sums + part, tl.sum(loss, 0))
    if CENTRED:
        tl.store(Sums + K + part, tl.sum(q_inner, 0))
        tl.store(Sums + 2 * K + part, tl.sum(q_sum, 0))
        if SCALED:
            tl.store(Sums + 3 * K + part, tl.max(q_inner_max, 0))


@triton.jit
def store_gradient(
    Z, ZFinal, dZ, Bias, max_p, log_p, max_q, log_q, centre, factor, part, V, stride_z, stride_f,
    DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(part * PART, tl.minimum(V, (part + 1) * PART), BLOCK):
        v = start + tl.arange(0, BLOCK)
        zq, slope = load_scores(Z, Bias, v, V, stride_z, TEMPERATURE, SOFTCAP, HAS_BIAS)
        zp, _ = load_scores(ZFinal, Bias, v, V, stride_f, TEMPERATURE, SOFTCAP, HAS_BIAS)
        # [BLOCK], like dz
        lp, lq = log_probability(zp - max_p, log_p), log_probability(zq - max_q, log_q)
        _, inner, q = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
        if DIVERGENCE == "forward_kl":
            dz = q - inner
        else:
            dz = -q * (inner - centre)
        dz = dz * factor * slope
        if IN_PLACE:  # all threads have read the block before any overwrites it
            tl.debug_barrier()
        tl.store(dZ + v, dz.to(dZ.dtype.element_ty), mask=v < stride_z)


@triton.jit(do_not_specialize=["C", "R", "S", "LAG", "spare"])
def split_rows_kernel(
    Z,  # [R, V]
    ZFinal,  # [C, V]
    dZ,  # [R, V]: Z, or in its memory from row `spare` on
    Bias,  # [V]
    FirstRow,  # [C + 1]: the token's first student row
    Factor,  # [R]
    Labels,  # [C]
    LogSumExp,  # [C]
    FinalEntropy,  # [C]
    FinalTop1,  # [C]
    LogProb,  # [C]
    FinalTopLogProb,  # [C]
    Divergence,  # [R]
    Entropy,  # [R]
    Agreement,  # [R]
    Top1,  # [R]
    TopLogProb,  # [R]
    Scale,  # [R], with SCALED: what undoes the row's scale
    Parts,  # [C + R, STATISTICS, K], then [R, SUMS, K]
    Numbers,  # [C + R, 2]: largest score and log of the sum; then [R, 2]: <q, inner>, its bound
    Counts,  # [1 + C + 3 R], zeros: programs begun; arrived of each row's stages
    C, R, S, V, K, LAG, spare, stride_z, stride_f, stride_d,
    DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LABELS: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    STATISTICS: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """S is the most student rows of a token. A step has the programs of the gradient at one token,
    of the terms LAG tokens on, and of the statistics, the final row's too, LAG tokens further.
    """
    number = tl.atomic_add(Counts, 1, sem="relaxed")
    STAGES: tl.constexpr = 3 if GRADIENT else 2  # pyright: ignore[reportAssignmentType]
    part, lane, step = number % K, number // K % (1 + STAGES * S), number // K // (1 + STAGES * S)
    stage = STAGES - 1 - lane // S  # 2: gradient, 1: terms, 0: statistics, -1: of the final row
    token = (C - 1 - step + tl.maximum(stage, 0) * LAG).to(tl.int64)
    CENTRED: tl.constexpr = GRADIENT and DIVERGENCE != "forward_kl"
    if (token >= 0) & (token < C):
        ZFinal += token * stride_f
        NumbersF = Numbers + 2 * token
        if stage < 0:
            label = tl.load(Labels + token).to(tl.int32) if HAS_LABELS else V
            PartsF = Parts + token * STATISTICS * K
            store_statistics(
                ZFinal, Bias, PartsF, label, part, V, stride_f, K,
                TEMPERATURE, SOFTCAP, HAS_BIAS, HAS_LABELS, PART, BLOCK,
            )  # fmt: skip
            if arrive(Counts + 1 + token) == K - 1:
                row_max, entropy, top1, log_total, log_others = join_statistics(
                    PartsF, NumbersF, K, HAS_LABELS, PARTS
                )
                tl.store(LogSumExp + token, row_max + log_total)
                tl.store(FinalEntropy + token, entropy)
                tl.store(FinalTop1 + token, top1)
                tl.store(FinalTopLogProb + token, -log_total)
                if HAS_LABELS:
                    # A label outside [0, V) reads nothing and gives -inf. [1]: loads take blocks.
                    v = tl.where(label < 0, V, label) + tl.zeros([1], tl.int32)
                    z, _ = load_scores(ZFinal, Bias, v, V, stride_f, TEMPERATURE, SOFTCAP, HAS_BIAS)
                    z -= row_max
                    # Near p = 1 from the other tokens' sum: the sum of all has no digits of 1 - p.
                    odds = z - log_others
                    near_one = -log1p_exp_neg(tl.maximum(odds, 0.0))
                    logprob = tl.where(odds > 0, near_one, z - log_total)
                    tl.store(LogProb + token + tl.zeros([1], tl.int64), logprob)
                arrive(Counts + 1 + token)
        else:
            row = tl.load(FirstRow + token) + lane % S
            Z += row * stride_z
            Count = Counts + 1 + C + row
            NumbersQ = Numbers + 2 * (C + row)
            Centre = Numbers + 2 * (C + R + row)
            Sums = Parts + ((C + R) * STATISTICS + row * SUMS) * K
            if row < tl.load(FirstRow + token + 1):
                if stage == 0:
                    PartsQ = Parts + (C + row) * STATISTICS * K
                    store_statistics(
                        Z, Bias, PartsQ, V, part, V, stride_z, K,
                        TEMPERATURE, SOFTCAP, HAS_BIAS, False, PART, BLOCK,
                    )  # fmt: skip
                    if arrive(Count) == K - 1:
                        max_q, entropy_q, top1_q, total_q, others_q = join_statistics(
                            PartsQ, NumbersQ, K, False, PARTS
                        )
                        tl.store(Entropy + row, entropy_q)
                        tl.store(Top1 + row, top1_q)
                        tl.store(TopLogProb + row, -total_q)
                        arrive(Count)
                elif stage == 1:
                    wait(Counts + 1 + token, K)
                    wait(Count, K)
                    store_terms(
                        Z, ZFinal, Bias, Sums, load_number(NumbersF), load_number(NumbersF + 1),
                        load_number(NumbersQ), load_number(NumbersQ + 1), part, V, stride_z,
                        stride_f, K, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA, TEMPERATURE, SOFTCAP,
                        HAS_BIAS, CENTRED, SCALED, PART, BLOCK,
                    )  # fmt: skip
                    if arrive(Count + R) == K - 1:
                        loss = tl.sum(load_parts(Sums, 0, K, 0.0, PARTS), 0)
                        tl.store(Divergence + row, loss)
                        same = load_number(Top1 + row) == load_number(FinalTop1 + token)
                        tl.store(Agreement + row, tl.where(same, 1.0, 0.0))
                        if CENTRED:
                            centre = tl.sum(load_parts(Sums, 1, K, 0.0, PARTS), 0)
                            centre /= tl.sum(load_parts(Sums, 2, K, 0.0, PARTS), 0)
                            tl.store(Centre, centre)
                            if SCALED:
                                bound = tl.max(load_parts(Sums, 3, K, 0.0, PARTS), 0)
                                tl.store(Centre + 1, bound)
                        arrive(Count + R)
                elif GRADIENT:
                    wait(Count + R, K)
                    log_p, log_q = load_number(NumbersF + 1), load_number(NumbersQ + 1)
                    centre = load_number(Centre) if CENTRED else 0.0
                    factor = tl.load(Factor + row) / TEMPERATURE
                    if DIVERGENCE == "jsd":
                        factor *= 1 - BETA
                    if SCALED:
                        if CENTRED:
                            # |q (centre - inner)| <= max |q inner| + max q |centre|
                            bound = load_number(Centre + 1) + tl.exp(-log_q) * tl.abs(centre)
                        else:
                            # |q - p| <= max(q, p), and both maxima are known.
                            bound = tl.maximum(tl.exp(-log_q), tl.exp(-log_p))
                        scale, inverse = power_of_two(bound * tl.abs(factor))
                        tl.store(Scale + row, inverse, mask=part == 0)
                        factor *= scale
                    if SHIFTED:
                        if row + spare < R:  # what its gradient is made of has been read
                            wait(Count + 2 * R + spare, K - 1)
                    store_gradient(
                        Z, ZFinal, dZ + row * stride_d, Bias, load_number(NumbersF), log_p,
                        load_number(NumbersQ), log_q, centre, factor, part, V, stride_z, stride_f,
                        DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA, TEMPERATURE, SOFTCAP, HAS_BIAS,
                        not SHIFTED, PART, BLOCK,
                    )  # fmt: skip
                    if SHIFTED:
                        arrive(Count + 2 * R)


# The launch


class SplitRows:
    """`final_rows` and `student_rows` of `rows.Rows` for one chunk after the other, in one launch.

    What `final_rows` returns is filled in by `student_rows`, whose rows are sorted by token. Behind
    its logits are `spare` rows of memory, of the same stride.
    """

    def __init__(
        self, layers: int, tokens: int, vocabulary: int, compute: torch.dtype,
        operand: torch.dtype | None, device: torch.device, nvidia: bool = torch.version.hip is None,
    ):  # fmt: skip
        """tokens: of a chunk, at most. operand: the gradient's dtype; None: no gradient."""
        self.options = {"num_warps": WARPS} | ({"maxnreg": REGISTERS} if nvidia else {})
        self.layers, self.operand = layers, operand
        # Until a logit is read again, LAG tokens pass through each stage, and their gradients.
        token = 3 * (1 + layers) * vocabulary * compute.itemsize
        token += 0 if operand is None else layers * vocabulary * operand.itemsize
        lag = LAG or int(CACHE_SHARE * cache_bytes(device)) // token
        self.lag = max(min(lag, tokens), 1)
        # Of a row's own token none, which would be waited for.
        self.spare = 0 if operand in (None, compute) else self.lag * layers

    def final_rows(
        self,
        z: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        math_: RowMath,
        entropies: bool,
        top1s: bool,
    ) -> FinalRows:
        del bias, math_, entropies, top1s
        self.labels = labels
        logsumexp, entropy, top_logprob = (z.new_empty(len(z)) for _ in range(3))
        top1 = torch.empty(len(z), dtype=torch.int64, device=z.device)
        logprob = z.new_empty(0 if labels is None else len(z))
        return FinalRows(logsumexp, entropy, top1, logprob, top_logprob)

    def student_rows(
        self,
        z: Tensor,
        z_final: Tensor,
        final: FinalRows,
        bias: Tensor | None,
        slot: Tensor,
        factor: Tensor,
        math_: RowMath,
        gradient: bool,
        stats: bool,
        operand: torch.dtype,
    ) -> StudentRows:
        del stats
        assert gradient == (self.operand is not None), "made for another call"
        assert not gradient or operand == self.operand, "made for another dtype"
        rows, tokens, vocabulary = len(slot), *z_final.shape
        divergence, entropy, agreement, top_logprob = (z.new_empty(rows) for _ in range(4))
        top1 = torch.empty(rows, dtype=torch.int64, device=z.device)
        scale = z.new_empty(rows if gradient and operand == torch.float16 else 0)
        d_logits = z
        if self.spare > 0:
            wide = z.as_strided((rows + self.spare, z.stride(0)), z.stride())
            d_logits = wide.view(operand)[self.spare :, :vocabulary]
        first_row = torch.searchsorted(slot, torch.arange(tokens + 1, device=z.device))
        part = min(PART * 4 // z.element_size(), int(triton.next_power_of_2(vocabulary)))
        parts = -(-vocabulary // part)
        lanes = 1 + (3 if gradient else 2) * self.layers
        steps = tokens + (2 if gradient else 1) * self.lag
        sums = z.new_empty(parts * ((tokens + rows) * STATISTICS + rows * SUMS))
        numbers = z.new_empty(2 * (tokens + 2 * rows))
        counts = torch.zeros(1 + tokens + 3 * rows, dtype=torch.int32, device=z.device)
        constants: dict[str, Any] = {
            **divergence_constants(math_),
            **score_constants(bias, math_),
            "HAS_LABELS": self.labels is not None,
            "GRADIENT": gradient,
            "SCALED": scale.numel() > 0,
            "SHIFTED": self.spare > 0,
            "STATISTICS": STATISTICS,
            "SUMS": SUMS,
            "PARTS": triton.next_power_of_2(parts),
            "PART": part,
            "BLOCK": min(BLOCK, part),
            **self.options,
        }
        split_rows_kernel[(steps * lanes * parts,)](
            z, z_final, d_logits, bias, first_row, factor.contiguous(), self.labels,
            final.logsumexp, final.entropy, final.top1, final.logprob, final.top_logprob,
            divergence, entropy, agreement, top1, top_logprob, scale, sums, numbers, counts,
            tokens, rows, self.layers, vocabulary, parts, self.lag, self.spare,
            z.stride(0), z_final.stride(0), d_logits.stride(0),
            **constants,
        )  # fmt: skip
        d_logits = d_logits if gradient else None
        return StudentRows(divergence, entropy, agreement, top1, top_logprob, d_logits, scale)


def cache_bytes(device: torch.device) -> int:
    """Of the second-level cache."""
    if device.type != "cuda":
        return CACHE_BYTES
    return torch.cuda.get_device_properties(device).L2_cache_size
