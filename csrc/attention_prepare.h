// Per query and head, once, what every tile of the backward needs: the logsumexps in base 2 and all
// that is subtracted from dP, rowsum(d_out * out) - d_lse and the alignment's share. Rows of weight
// 0 become harmless numbers, whatever they held.
#pragma once

#include "attention_divergence.h"
#include "attention_params.h"

constexpr int PREPARE_THREADS = 128, PREPARE_LANES = 8;  // of a row
constexpr int PREPARE_ROWS = PREPARE_THREADS / PREPARE_LANES;

struct alignas(16) Words {
  unsigned word[4];
};

template <class ELEMENT>
OISD_DEVICE float dot(const Words& a, const Words& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const Pair x = unpack(ELEMENT{}, a.word[i]), y = unpack(ELEMENT{}, b.word[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

template <class ELEMENT, int HEAD, Divergence D, bool PLAIN>
OISD_DEVICE void attention_prepare(const PrepareParams& p) {
  const long long all = static_cast<long long>(p.heads) * p.tokens;
  const long long at =
      static_cast<long long>(block_index()) * PREPARE_ROWS + thread_index() / PREPARE_LANES;
  const int part = thread_index() % PREPARE_LANES;
  const bool exists = at < all;
  const int head = exists ? static_cast<int>(at / p.tokens) : 0;
  const long long token = exists ? at - static_cast<long long>(head) * p.tokens : 0;

  float delta = 0.f;
  if constexpr (PLAIN) {
    const auto words = [&](const Operand& x, int chunk) {
      const auto* data = static_cast<const unsigned short*>(x.data);
      return *reinterpret_cast<const Words*>(data + token * x.row + head * x.head + chunk * CHUNK);
    };
#pragma unroll
    for (int i = part; i < HEAD / CHUNK; i += PREPARE_LANES)
      if (exists) delta += dot<ELEMENT>(words(p.out, i), words(p.d_out, i));
#pragma unroll
    for (int lanes = 1; lanes < PREPARE_LANES; lanes *= 2) delta += shuffle_xor(delta, lanes);
    if (exists && p.d_lse) delta -= p.d_lse[at];
  }
  if (!exists || part) return;

  const float scale = p.gradient_scale ? *p.gradient_scale : 1.f;
  delta *= scale;
  bool live = PLAIN;
  if constexpr (D != NO_DIVERGENCE) {
    const float g = scale * p.row_weight[token], factor = row_factor<D>(g, p.beta);
    const bool weighs = factor != 0.f;
    const float statistic = weighs && p.statistic ? p.statistic[at] : 0.f;
    if (weighs) delta += row_delta<D>(g, p.beta, statistic);
    if (head == 0) p.factor[token] = factor;
    p.lse2_teacher[at] = weighs ? LOG2E * p.lse_teacher[at] : 0.f;
    live |= weighs;
  }
  p.lse2[at] = live ? LOG2E * p.lse[at] : 0.f;
  p.delta[at] = delta;
}
