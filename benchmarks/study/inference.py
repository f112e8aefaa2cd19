"""Paired differences, Student's t and Holm's correction, in plain Python.

Differences of an arm to the baseline are taken within a (task, seed), whose runs share their start,
their problems and the random numbers of sampling. Over tasks, means count each task alike:

    d = mean_k mean(d_k)      Var d = sum_k s_k^2 / n_k / K^2

with Satterthwaite's degrees of freedom, (sum v_k)^2 / sum(v_k^2 / (n_k - 1)), v_k = s_k^2 / n_k.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean of paired differences."""

    mean: float
    half_width: float  # of the interval; NaN where a group has fewer than two differences
    p: float  # two-sided, of a mean of 0; NaN as above
    pairs: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(groups: Sequence[Sequence[float]], confidence: float = 0.95) -> Estimate:
    """The mean over groups (tasks) of the mean of each group's differences (seeds).

    Raises ValueError for an empty group or none.
    """
    if not groups or not all(groups):
        raise ValueError("estimate: wanted at least one difference in each group, got none")
    mean = statistics.mean(statistics.mean(group) for group in groups)
    pairs = sum(map(len, groups))
    if any(len(group) < 2 for group in groups):
        return Estimate(mean, math.nan, math.nan, pairs)
    parts = [statistics.variance(group) / len(group) for group in groups]
    error = math.sqrt(sum(parts)) / len(groups)
    if error == 0:
        return Estimate(mean, 0.0, float(mean == 0), pairs)
    squares = sum(v**2 / (len(g) - 1) for v, g in zip(parts, groups, strict=True))
    freedom = sum(parts) ** 2 / squares
    half = t_quantile(confidence, freedom) * error
    return Estimate(mean, half, t_tail(abs(mean) / error, freedom), pairs)


def t_tail(t: float, freedom: float) -> float:
    """P(|T| >= t) of Student's t, t >= 0: the regularised incomplete beta function.

    I_x(freedom / 2, 1 / 2) with x = freedom / (freedom + t^2).
    """
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def t_quantile(confidence: float, freedom: float) -> float:
    """The t with P(|T| < t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - confidence else (low, middle)
    return high


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: the i-th smallest of m times m - i + 1.

    Each is at least those of smaller p, and at most 1.
    """
    adjusted = [0.0] * len(probabilities)
    least = 0.0
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(probabilities) - rank) * probabilities[place]))
        adjusted[place] = least
    return adjusted


def _incomplete_beta(x: float, a: float, b: float) -> float:
    if x in (0.0, 1.0):
        return x
    # The continued fraction converges fast below the mean of the beta distribution only.
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)) of the incomplete beta function, from its far end."""
    value = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1 + even / (1 + odd / value)
    return 1 - (a + b) * x / (a + 1) / value
