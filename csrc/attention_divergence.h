// The elementwise mathematics of JSD and KL, in base-2 logarithms.
//
// It stands here as well as in oisd_kernels/divergences.py because CUDA cannot import what Triton
// compiles. Tests hold both against oisd_kernels/reference.py.
//
// clang-format off
// p = log2 P of the student, t = log2 T of the teacher, g a row's weight, dS the gradient to the
// student's scores; x = t - p + log2(beta / (1 - beta)), s = log2(1 + 2^x), a softplus.
//
//   jsd         loss  beta * KL(T, M) + (1 - beta) * KL(P, M),  M = beta * T + (1 - beta) * P
//               dS    factor * P * (s - <P, s>),                factor = -(1 - beta) * ln2 * g
//   forward_kl  loss  KL(T, P)
//               dS    factor * (P - T),                         factor = g
//   reverse_kl  loss  KL(P, T)
//               dS    factor * P * (p - t - <P, p - t>),        factor = ln2 * g
//
// The row statistic, in nats: <P, s> for jsd, KL(P, T) for reverse_kl.
// clang-format on
#pragma once

#include "primitives.h"

enum Divergence { NO_DIVERGENCE, JSD, FORWARD_KL, REVERSE_KL };

constexpr float LN2 = 0.69314718055994531f;
constexpr float LOG2E = 1.4426950408889634f;

OISD_DEVICE float smaller(float a, float b) { return a < b ? a : b; }
OISD_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// log2(1 + e), 0 <= e <= 1, with e's own digits where 1 + e would drop them.
OISD_DEVICE float log2_1p(float e) {
  const float series = e * LOG2E * (1.f - e * (1.f / 2 - e * (1.f / 3 - e * (1.f / 4))));
  return e < 0x1p-7f ? series : log2_of(1.f + e);
}

// One key's share of a row's loss and statistic, in units of log(2), but for the terms of the KLs
// that are linear in P and T (`rest`, in nats): multiples of P and T whose sums are known are added
// such that rounding cancels near P = T.
struct Sums {
  float value = 0.f, statistic = 0.f, rest = 0.f;
};

template <Divergence D>
OISD_DEVICE void add_key(Sums& sums, float p, float t, float log2_beta, float log2_other) {
  if constexpr (D == JSD) {
    // P' = (1-b) P and T' = b T: the larger from its logarithm, the smaller as a share of it.
    const float lp = p + log2_other, lt = t + log2_beta, x = lt - lp;
    const float e = exp2_of(x > 0.f ? -x : x), l = log2_1p(e);
    const float most = exp2_of(larger(lp, lt)), least = most * e;
    const float P = x > 0.f ? least : most, s = larger(x, 0.f) + l;  // P is P' here
    const float student = P * (s + log2_other);
    const float teacher = (x > 0.f ? most : least) * (smaller(x, 0.f) - l - log2_beta);
    sums.value += teacher - student;
    sums.statistic += P * s;
  } else {
    const float P = exp2_of(p), T = exp2_of(t), d = t - p;
    sums.rest += D == FORWARD_KL ? P - T : T - P;
    sums.value += D == FORWARD_KL ? T * d : -P * d;
  }
}

// In nats; the statistic of jsd is <P, s>.
template <Divergence D>
OISD_DEVICE float row_value(const Sums& sums) {
  return D == JSD ? LN2 * sums.value : LN2 * sums.value + sums.rest;
}
template <Divergence D>
OISD_DEVICE float row_statistic(const Sums& sums, float log2_other) {
  return D == JSD ? LN2 * sums.statistic * exp2_of(-log2_other) : row_value<D>(sums);
}

// The factor of a row of weight g, and what the alignment adds to delta.
template <Divergence D>
OISD_DEVICE float row_factor(float g, float beta) {
  if constexpr (D == JSD) return -(1.f - beta) * LN2 * g;
  if constexpr (D == REVERSE_KL) return LN2 * g;
  return g;
}
template <Divergence D>
OISD_DEVICE float row_delta(float g, float beta, float statistic) {
  if constexpr (D == JSD) return -(1.f - beta) * g * statistic;
  if constexpr (D == REVERSE_KL) return g * statistic;
  return -g;
}

// What the alignment adds to dP; the forward KL adds none.
template <Divergence D>
OISD_DEVICE float key_term(float p, float t, float factor, float log2_ratio) {
  if constexpr (D == JSD) {
    const float x = t - p + log2_ratio;
    return factor * (larger(x, 0.f) + log2_1p(exp2_of(x > 0.f ? -x : x)));
  }
  if constexpr (D == REVERSE_KL) return factor * (p - t);
  return 0.f;
}
