"""Row kernels of a chunk: one program per row, reading logits in blocks of V.

    final_rows      one pass: logsumexp, entropy, likeliest token, log-probability of the label
    final_gradient  one pass: -factor * e^(z - logsumexp), and factor * (1 - p) at the label
    student_rows    one pass for the student's logsumexp, one for the divergence and <q, inner>, one
                    for the gradient factor * q * (<q, inner> - inner), with the terms of
                    `oisd_kernels.divergences`. The forward KL's gradient, factor * (q - p), needs
                    no inner product, so one pass does the work of the last two.

Gradients, to the logits before softcap and temperature, overwrite the logits. In half precision a
row's gradient lies in the first half of its logits' memory: before a block is stored, all threads
have read all logits up to it, and the store never reaches further. Sums are kept per lane of a
block, [BLOCK], and added up as a tree at the end, so that their error does not grow with V.

Letters: C final rows, R student rows, V vocabulary.
"""

# pyright: reportGeneralTypeIssues=false
# (pyright believes that a jitted function returns None, which cannot be unpacked)

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oisd_kernels.divergences import log1p_exp_neg, log_probability, tanh, terms
from oisd_kernels.lens.chunked.rows import FinalRows, RowMath, StudentRows, in_place

BLOCK, WARPS = 1024, 8


@triton.jit
def load_scores(
    Z, Bias, v, V, stride,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scores of tokens v of the row at Z, -inf from V on, and the softcap's derivative; v's shape.

    The row's memory reaches up to `stride` and so does the mask: an odd V keeps wide loads.
    """
    in_v = v < V
    z = tl.load(Z + v, mask=v < stride, other=0.0)
    if HAS_BIAS:
        z += tl.load(Bias + v, mask=in_v, other=0.0)
    slope = tl.full(z.shape, 1.0, z.dtype)
    if SOFTCAP is not None:
        tanh_z = tanh(z / SOFTCAP)
        z = SOFTCAP * tanh_z
        slope = 1 - tanh_z * tanh_z
    if TEMPERATURE != 1.0:
        z = z / TEMPERATURE
    return tl.where(in_v, z, -float("inf")), slope


@triton.jit
def row_statistics(
    Z, Bias, V, stride, label,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest score, entropy, likeliest token, its log-probability, and the log of the sum of
    e^(z - largest score) over all tokens but the label, in one pass.

    Each lane of [BLOCK] keeps the maximum, its token and its own sums, in an online softmax. A NaN
    makes all results NaN but the largest score and its token, which are then those of the rest.
    """
    o_v = tl.arange(0, BLOCK)
    dtype = Z.dtype.element_ty
    lane_max = tl.full([BLOCK], -1e30, dtype)
    total = tl.zeros([BLOCK], dtype)  # sum of e^(z - lane_max)
    others = tl.zeros([BLOCK], dtype)  # `total` without the label
    moment = tl.zeros([BLOCK], dtype)  # sum of (z - lane_max) e^(z - lane_max)
    argmax = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v = start + o_v
        # [BLOCK]
        z, _ = load_scores(Z, Bias, v, V, stride, TEMPERATURE, SOFTCAP, HAS_BIAS)
        # Finite, so that differences of two are not NaN; small enough that many can be summed.
        z = tl.where(z < -1e30, -1e30, z)
        difference = z - lane_max
        # One exponential serves both cases: it rescales the sums if z is a new maximum, and is
        # z's own term if not.
        e = tl.exp(-tl.abs(difference))
        is_larger = difference > 0
        # The moment uses the old total, so it is updated first.
        moment = tl.where(is_larger, e * (moment - difference * total), moment + difference * e)
        total = tl.where(is_larger, total * e + 1, total + e)
        is_other = tl.where(v == label, 0.0, 1.0)
        others = tl.where(is_larger, others * e + is_other, others + is_other * e)
        argmax = tl.where(is_larger, v, argmax)
        lane_max = tl.where(is_larger, z, lane_max)
    # The lanes' sums are brought to the row's maximum and added up.
    row_max = tl.max(lane_max, 0)
    top1 = tl.min(tl.where(lane_max == row_max, argmax, 2147483647), 0)
    difference = lane_max - row_max
    e = tl.exp(difference)
    moment = tl.sum(e * (moment + difference * total), 0)
    total = tl.sum(e * total, 0)
    log_total = tl.log(total)
    log_others = tl.log(tl.sum(e * others, 0))
    return row_max, log_total - moment / total, top1, -log_total, log_others


@triton.jit
def power_of_two(bound):
    """The power of two, at most 2^100, that brings `bound` to [2^13, 2^14), and its inverse."""
    exponent = tl.floor(tl.log2(tl.where(bound > 0, bound, 1.0)))
    exponent = tl.minimum(tl.maximum(13 - exponent, -100.0), 100.0)
    return tl.exp2(exponent), tl.exp2(-exponent)


@triton.jit
def final_rows_kernel(
    Z,  # [C, V]
    Bias,  # [V]
    Labels,  # [C]
    LogSumExp,  # [C]
    Entropy,  # [C]
    Top1,  # [C]
    LogProb,  # [C]
    TopLogProb,  # [C]
    V, stride_z,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride_z
    label = tl.load(Labels + row).to(tl.int32) if HAS_LABELS else V
    row_max, entropy, top1, top_logprob, log_others = row_statistics(
        Z, Bias, V, stride_z, label, TEMPERATURE, SOFTCAP, HAS_BIAS, BLOCK
    )
    tl.store(LogSumExp + row, row_max - top_logprob)
    tl.store(Entropy + row, entropy)
    tl.store(Top1 + row, top1)
    tl.store(TopLogProb + row, top_logprob)
    if HAS_LABELS:
        # A label outside [0, V) reads nothing and gives -inf. [1], since the loads take blocks.
        label = tl.where(label < 0, V, label) + tl.zeros([1], tl.int32)
        z, _ = load_scores(Z, Bias, label, V, stride_z, TEMPERATURE, SOFTCAP, HAS_BIAS)
        z -= row_max
        # Near p = 1 from the other tokens' sum: the sum of all has no digits of 1 - p.
        odds = z - log_others
        near_one = -log1p_exp_neg(tl.maximum(odds, 0.0))
        logprob = tl.where(odds > 0, near_one, z + top_logprob)
        tl.store(LogProb + row + tl.zeros([1], tl.int64), logprob)


@triton.jit
def final_gradient_kernel(
    Z,  # [C, V]
    dZ,  # [C, V], in the memory of Z
    Bias,  # [V]
    Labels,  # [C]
    LogSumExp,  # [C]
    LogProb,  # [C]
    Factor,  # [C]
    Scale,  # [C], with SCALED: what undoes the row's scale
    V, stride_z, stride_d,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride_z
    dZ += row * stride_d
    o_v = tl.arange(0, BLOCK)
    logsumexp, label = tl.load(LogSumExp + row), tl.load(Labels + row).to(tl.int32)
    factor = tl.load(Factor + row) / TEMPERATURE
    # 1 - p of the label, as e^logprob - 1 = 2 tanh(logprob/2) / (1 - tanh(logprob/2)).
    half = tanh(tl.load(LogProb + row) / 2)
    rest = -2 * half / (1 - half)
    if SCALED:
        # |dz| <= |factor| (1 - p); the softcap only lowers it.
        scale, inverse = power_of_two(tl.abs(factor) * rest)
        tl.store(Scale + row, inverse)
        factor *= scale
    for start in range(0, V, BLOCK):
        v = start + o_v
        # [BLOCK], like all that follows
        z, slope = load_scores(Z, Bias, v, V, stride_z, TEMPERATURE, SOFTCAP, HAS_BIAS)
        dz = factor * tl.where(v == label, rest, -tl.exp(z - logsumexp)) * slope
        # All threads have read the block before any overwrites it: dZ is in Z's memory.
        tl.debug_barrier()
        tl.store(dZ + v, dz.to(dZ.dtype.element_ty), mask=v < stride_z)


@triton.jit
def student_rows_kernel(
    Z,  # [R, V]
    ZFinal,  # [C, V]
    dZ,  # [R, V], in the memory of Z
    Bias,  # [V]
    Slot,  # [R]: the student row's final row
    Factor,  # [R]
    FinalTop1,  # [C]
    FinalTopLogProb,  # [C]
    Divergence,  # [R]
    Entropy,  # [R]
    Agreement,  # [R]
    Top1,  # [R]
    TopLogProb,  # [R]
    Scale,  # [R], with SCALED: what undoes the row's scale
    V, stride_z, stride_f, stride_d,
    DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(Slot + row)
    Z += row * stride_z
    ZFinal += slot * stride_f
    dZ += row * stride_d
    o_v = tl.arange(0, BLOCK)
    max_q, entropy, top1, lq_top, log_sum = row_statistics(
        Z, Bias, V, stride_z, V, TEMPERATURE, SOFTCAP, HAS_BIAS, BLOCK
    )
    # Scores less their row's largest, as in the sums: a logsumexp of large scores has lost digits
    # of the log-probabilities that matter.
    top1_p, lp_top = tl.load(FinalTop1 + slot), tl.load(FinalTopLogProb + slot)
    v_top = top1_p.to(tl.int64) + tl.zeros([1], tl.int64)  # a block, as `load_scores` takes it
    max_p, slope_p = load_scores(ZFinal, Bias, v_top, V, stride_f, TEMPERATURE, SOFTCAP, HAS_BIAS)
    max_p = tl.max(max_p, 0)
    tl.store(Entropy + row, entropy)
    tl.store(Agreement + row, tl.where(top1 == top1_p, 1.0, 0.0))
    tl.store(Top1 + row, top1)
    tl.store(TopLogProb + row, lq_top)
    factor = tl.load(Factor + row) / TEMPERATURE
    ONE_PASS: tl.constexpr = DIVERGENCE == "forward_kl" and GRADIENT
    if DIVERGENCE == "jsd":
        factor *= 1 - BETA

    # Of each lane, [BLOCK]: the divergence, <q, inner>, the sum of q, and the largest |q * inner|
    loss = tl.zeros([BLOCK], lq_top.dtype)
    q_inner = tl.zeros([BLOCK], lq_top.dtype)
    q_sum = tl.zeros([BLOCK], lq_top.dtype)
    q_inner_max = tl.zeros([BLOCK], lq_top.dtype)
    if not ONE_PASS:
        for start in range(0, V, BLOCK):
            v = start + o_v
            zq, _ = load_scores(Z, Bias, v, V, stride_z, TEMPERATURE, SOFTCAP, HAS_BIAS)
            zp, _ = load_scores(ZFinal, Bias, v, V, stride_f, TEMPERATURE, SOFTCAP, HAS_BIAS)
            # [BLOCK], like the terms
            lp, lq = log_probability(zp - max_p, -lp_top), log_probability(zq - max_q, -lq_top)
            term, inner, q = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
            loss += term
            q_inner += q * inner
            q_sum += q
            if SCALED:
                q_inner_max = tl.maximum(q_inner_max, tl.abs(q * inner))
        centre = tl.sum(q_inner, 0) / tl.sum(q_sum, 0)

    if GRADIENT:
        if SCALED:
            if ONE_PASS:
                # |q - p| <= max(q, p), and both maxima are known.
                dz_bound = tl.maximum(tl.exp(lq_top), tl.exp(lp_top))
            else:
                # |q (centre - inner)| <= max |q inner| + max q |centre|
                dz_bound = tl.max(q_inner_max, 0) + tl.exp(lq_top) * tl.abs(centre)
            scale, inverse = power_of_two(dz_bound * tl.abs(factor))
            tl.store(Scale + row, inverse)
            factor *= scale
        for start in range(0, V, BLOCK):
            v = start + o_v
            zq, slope = load_scores(Z, Bias, v, V, stride_z, TEMPERATURE, SOFTCAP, HAS_BIAS)
            zp, _ = load_scores(ZFinal, Bias, v, V, stride_f, TEMPERATURE, SOFTCAP, HAS_BIAS)
            # [BLOCK], like dz
            lp, lq = log_probability(zp - max_p, -lp_top), log_probability(zq - max_q, -lq_top)
            term, inner, q = terms(lp, lq, DIVERGENCE, BETA, LOG_BETA, LOG_1M_BETA)
            if ONE_PASS:
                loss += term
                dz = q - inner
            else:
                dz = -q * (inner - centre)
            dz = dz * factor * slope
            # All threads have read the block before any overwrites it: dZ is in Z's memory.
            tl.debug_barrier()
            tl.store(dZ + v, dz.to(dZ.dtype.element_ty), mask=v < stride_z)
    tl.store(Divergence + row, tl.sum(loss, 0))


# The launches: the functions of `rows.Rows`, which says what the arguments are.


def final_rows(
    z: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    math_: RowMath,
    entropies: bool,
    top1s: bool,
) -> FinalRows:
    del entropies, top1s  # they come along for nothing
    logsumexp, entropy, top_logprob = (z.new_empty(len(z)) for _ in range(3))
    top1 = torch.empty(len(z), dtype=torch.int64, device=z.device)
    logprob = z.new_empty(0 if labels is None else len(z))
    final_rows_kernel[(len(z),)](
        z, bias, labels, logsumexp, entropy, top1, logprob, top_logprob, z.shape[1], z.stride(0),
        **_constants(z, bias, math_, HAS_LABELS=labels is not None),
    )  # fmt: skip
    return FinalRows(logsumexp, entropy, top1, logprob, top_logprob)


def final_rows_again(
    z: Tensor,
    final: FinalRows,
    bias: Tensor | None,
    labels: Tensor,
    old: RowMath,
    new: RowMath,
    entropies: bool,
) -> FinalRows:
    del final, old  # the logits are as they were
    return final_rows(z, bias, labels, new, entropies, False)


def final_gradient(
    z: Tensor,
    final: FinalRows,
    bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    math_: RowMath,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    d_logits, scale = in_place(z, operand)
    final_gradient_kernel[(len(z),)](
        z, d_logits, bias, labels, final.logsumexp, final.logprob, factor.contiguous(), scale,
        z.shape[1], z.stride(0), d_logits.stride(0),
        **_constants(z, bias, math_, SCALED=scale.numel() > 0),
    )  # fmt: skip
    return d_logits, scale


def student_rows(
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
    divergence, entropy, agreement, top_logprob = (z.new_empty(len(z)) for _ in range(4))
    top1 = torch.empty(len(z), dtype=torch.int64, device=z.device)
    d_logits, scale = in_place(z, operand) if gradient else (z, z.new_empty(0))
    constants = _constants(z, bias, math_, GRADIENT=gradient, SCALED=scale.numel() > 0)
    student_rows_kernel[(len(z),)](
        z, z_final, d_logits, bias, slot.contiguous(), factor.contiguous(), final.top1,
        final.top_logprob, divergence, entropy, agreement, top1, top_logprob, scale, z.shape[1],
        z.stride(0), z_final.stride(0), d_logits.stride(0), **constants,
        **divergence_constants(math_),
    )  # fmt: skip
    d_logits = d_logits if gradient else None
    return StudentRows(divergence, entropy, agreement, top1, top_logprob, d_logits, scale)


def divergence_constants(math_: RowMath) -> dict[str, Any]:
    """Those of a kernel that calls `terms`."""
    return {
        "DIVERGENCE": math_.divergence,
        "BETA": math_.beta,
        "LOG_BETA": math.log(math_.beta),
        "LOG_1M_BETA": math.log1p(-math_.beta),
    }


def score_constants(bias: Tensor | None, math_: RowMath) -> dict[str, Any]:
    """Those of a kernel that calls `load_scores`."""
    return {
        "TEMPERATURE": math_.temperature,
        "SOFTCAP": math_.softcap,
        "HAS_BIAS": bias is not None,
    }


def _constants(z: Tensor, bias: Tensor | None, math_: RowMath, **more: Any) -> dict[str, Any]:
    return {
        **more,
        **score_constants(bias, math_),
        "BLOCK": min(BLOCK, triton.next_power_of_2(z.shape[1])),
        "num_warps": WARPS,
    }
