"""The elementwise mathematics of JSD and KL for all Triton kernels, once.

p teacher, q student, lp and lq their logarithms (clamped to the lowest finite number, so that their
difference is never NaN where both are 0), D = lp - lq. A divergence of a row is the sum of its
terms; the gradient to the student's scores is `q * (inner - <q, inner>)` times a constant, but for
the forward KL, where it is `q - p`. The multiples of p and q in the terms are constants when
summed; they make rounding cancel near p = q, as in `oisd_kernels.reference`.

    jsd         inner = s = softplus(x), x = D + log(beta/(1-beta))     constant -(1-beta)
    reverse_kl  inner = D                                               constant -1
"""

import triton
import triton.language as tl


@triton.jit
def log1p_exp_neg(a):
    """log(1 + exp(-a)) for a >= 0, to full relative precision however small."""
    e = tl.exp(-a)
    if e.dtype == tl.float64:
        u = 1 + e
        return tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    # 2 atanh(e / (2 + e)), whose argument is at most 1/3. tl.log would lose digits next to 1.
    r = e / (2 + e)
    w = r * r
    series = 1 / 11 + w * (1 / 13 + w * (1 / 15))
    series = 1 / 5 + w * (1 / 7 + w * (1 / 9 + w * series))
    return 2 * r * (1 + w * (1 / 3 + w * series))


@triton.jit
def tanh(x):
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    far = (1 - e) / (1 + e)
    if x.dtype == tl.float64:
        near = far
    else:  # 1 - e cancels
        w = x * x
        near = a * (1 + w * (-1 / 3 + w * (2 / 15 + w * (-17 / 315 + w * (62 / 2835)))))
    return tl.where(x < 0, -1.0, 1.0) * tl.where(a < 0.25, near, far)


@triton.jit
def log_probability(score, logsumexp):
    """Keeps NaN, clamps -inf to the lowest finite number."""
    lp = score - logsumexp
    lowest = -3.4028234663852886e38
    return tl.where(lp < lowest, lowest, lp)


@triton.jit
def terms(
    lp,
    lq,
    DIVERGENCE: tl.constexpr,
    BETA: tl.constexpr,
    LOG_BETA: tl.constexpr,
    LOG_1M_BETA: tl.constexpr,
):
    """Row terms of the divergence and `inner`, with q; `inner` is p for the forward KL."""
    p, q = tl.exp(lp), tl.exp(lq)
    D = lp - lq
    if DIVERGENCE == "forward_kl":
        return p * D - p + q, p, q
    elif DIVERGENCE == "reverse_kl":
        return p - q - q * D, D, q
    else:
        x = D + (LOG_BETA - LOG_1M_BETA)
        l1p = log1p_exp_neg(tl.abs(x))
        s = tl.maximum(x, 0.0) + l1p
        teacher = p * (tl.minimum(x, 0.0) - l1p - LOG_BETA)  # p * log(p/m)
        student = q * (s + LOG_1M_BETA)  # -q * log(q/m)
        return BETA * teacher - (1 - BETA) * student, s, q


@triton.jit
def inner(D, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr):
    """`inner` of `terms` alone, of "jsd" (LOG_ODDS = log(beta/(1-beta))) and "reverse_kl"."""
    if DIVERGENCE == "reverse_kl":
        return D
    else:
        x = D + LOG_ODDS
        return tl.maximum(x, 0.0) + log1p_exp_neg(tl.abs(x))
