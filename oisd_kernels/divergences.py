"""JSD and KL elementwise, shared by all Triton kernels.

p is the teacher's probability and q the student's, lp and lq are their logarithms, m = beta p +
(1-beta) q and D = lp - lq. lp and lq are clamped to the lowest finite number, so that D is not NaN
where both probabilities are 0. A row's divergence is the sum of its terms. Its gradient to the
student's scores is `q * (inner - <q, inner>)` times a constant, except for the forward KL, whose
gradient is q - p.

                 term                                       inner                constant
    jsd          beta p log(p/m) + (1-beta) q log(q/m)      s = softplus(x)      -(1-beta)
    reverse_kl   p - q - q D                                D                    -1
    forward_kl   p D - p + q                                (p is returned)

with x = D + log(beta/(1-beta)), log(p/m) = x - s - log(beta) and log(q/m) = -s - log(1-beta). The
KLs' extra p - q sums to 0 over a row. It makes rounding errors cancel where p is close to q, as in
`oisd_kernels.reference`. Every function works on blocks of any shape.
"""

import triton
import triton.language as tl


@triton.jit
def log1p_exp_neg(a):
    """log(1 + exp(-a)) for a >= 0, accurate in relative terms even where the result is tiny."""
    e = tl.exp(-a)
    if e.dtype == tl.float64:
        # log(u) * e / (u - 1) corrects log(u) for the rounding of u = 1 + e.
        u = 1 + e
        return tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    # log(1 + e) = 2 atanh(r), r <= 1/3, as a series in r^2. tl.log(1 + e) loses digits near 1.
    # Smallest terms first (Horner), so that the result has full precision.
    r = e / (2 + e)
    w = r * r
    series = 1 / 11 + w * (1 / 13 + w * (1 / 15))
    series = 1 / 5 + w * (1 / 7 + w * (1 / 9 + w * series))
    return 2 * r * (1 + w * (1 / 3 + w * series))


@triton.jit
def tanh(x):
    """Accurate in relative terms near 0 too."""
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    quotient = (1 - e) / (1 + e)
    if x.dtype == tl.float64:
        series = quotient
    else:  # near 0 the quotient's 1 - e cancels: Taylor series up to x^9
        w = x * x
        series = a * (1 + w * (-1 / 3 + w * (2 / 15 + w * (-17 / 315 + w * (62 / 2835)))))
    return tl.where(x < 0, -1.0, 1.0) * tl.where(a < 0.25, series, quotient)


@triton.jit
def log_probability(score, logsumexp):
    """score - logsumexp, with -inf clamped to the lowest finite number. NaN stays NaN."""
    lp = score - logsumexp
    lowest = -3.4028234663852886e38
    # Not tl.maximum, which may drop a NaN.
    return tl.where(lp < lowest, lowest, lp)


@triton.jit
def terms(
    lp, lq,
    DIVERGENCE: tl.constexpr, BETA: tl.constexpr, LOG_BETA: tl.constexpr, LOG_1M_BETA: tl.constexpr,
):  # fmt: skip
    """Terms of the divergence, `inner` (p for the forward KL), and q; all of lp's shape."""
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
        # x - s = min(x, 0) - l1p without cancellation for large x.
        p_log_pm = p * (tl.minimum(x, 0.0) - l1p - LOG_BETA)
        q_log_mq = q * (s + LOG_1M_BETA)  # = -q log(q/m)
        return BETA * p_log_pm - (1 - BETA) * q_log_mq, s, q


@triton.jit
def inner(D, DIVERGENCE: tl.constexpr, LOG_ODDS: tl.constexpr):
    """`inner` of "jsd", LOG_ODDS = log(beta/(1-beta)), or of "reverse_kl", from D alone."""
    if DIVERGENCE == "reverse_kl":
        return D
    else:
        x = D + LOG_ODDS
        return tl.maximum(x, 0.0) + log1p_exp_neg(tl.abs(x))
