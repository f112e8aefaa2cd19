// Value of the divergence and the row statistic that its backward needs, of a block's queries.
#pragma once

#include "attention_divergence.h"
#include "attention_blocks.h"
#include "sm90_engine.h"

template <class ELEMENT, class TILE, Divergence D>
OISD_DEVICE void attention_statistics(const StatisticsParams& p) {
  constexpr int OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  const Layout& layout = p.layout;
  const int lane = thread_index() % WARP, warp = uniform(thread_index() / WARP);
  const int head = block_index() % layout.heads;
  // The last queries of a causal sequence have the most keys: they go first.
  const int index = layout.tiles[layout.sequences] - 1 - block_index() / layout.heads;
  Place place;
  if (!find_place(layout, index, OWN, place)) return;
  const int own_token = place.begin + place.first;
  const auto kept = [&](int token) { return p.keep == nullptr || p.keep[token] != 0; };

  int next, last;
  streamed_range<false, OWN, STREAMED>(layout, place, next, last);
  if (!any_live<OWN>(own_token, place.length - place.first, kept)) last = 0;

  const int key_head = head / (layout.heads / layout.key_heads);
  const int key_head_teacher = head / (layout.heads / layout.key_heads_teacher);
  const unsigned own = shared_base(), streamed = own + 2 * TILE::OWN_BYTES;
  const auto copy_keys = [&](int stage) {
    const unsigned to = streamed + stage * 2 * TILE::STREAMED_BYTES;
    const auto valid = [&](int row) { return next + row < place.length; };
    copy_tile<TILE, STREAMED>(to, p.k, key_head, place.begin + next, valid);
    copy_tile<TILE, STREAMED>(to + TILE::STREAMED_BYTES, p.k_teacher, key_head_teacher,
                              place.begin + next, valid);
    copy_async_commit();
  };

  const Engine<ELEMENT, TILE> engine(thread_index());
  constexpr int ROWS = decltype(engine)::ROWS;
  const int own_row = 16 * warp + accumulator_row(lane);  // of this lane, and 8 rows further
  typename decltype(engine)::Held held, held_teacher;
  float lse2[2], lse2_teacher[2];
  bool keep[2];
  Sums total[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = own_row + 8 * i;
    keep[i] = place.first + row < place.length && kept(own_token + row);
    const int at_row = head * layout.tokens + own_token + row;
    lse2[i] = keep[i] ? LOG2E * p.lse[at_row] : 0.f;
    lse2_teacher[i] = keep[i] ? LOG2E * p.lse_teacher[at_row] : 0.f;
  }

  if (next < last) {
    const auto valid = [&](int row) {
      return place.first + row < place.length && kept(own_token + row);
    };
    copy_tile<TILE, OWN>(own, p.q, head, own_token, valid);
    copy_tile<TILE, OWN>(own + TILE::OWN_BYTES, p.q_teacher, head, own_token, valid);
    copy_keys(0);
    copy_async_wait_all();
    engine.arrived();
    barrier();
    held = engine.hold(own);
    held_teacher = engine.hold(own + TILE::OWN_BYTES);
  }
  for (int stage = 0; next < last; stage ^= 1) {
    copy_async_wait_all();
    engine.arrived();
    barrier();
    const int first = next;
    next += STREAMED;
    if (next < last) copy_keys(stage ^ 1);

    const int group_row = 16 * warp / ROWS * ROWS;
    const View<false, ROWS, STREAMED> view(layout, place.length, place.first + group_row, first);
    if (view.hidden) continue;
    const unsigned keys = streamed + stage * 2 * TILE::STREAMED_BYTES;
    float s[STREAMED / 8][4] = {}, s_teacher[STREAMED / 8][4] = {};
    engine.begin();
    engine.scores(s, held, keys);
    engine.scores(s_teacher, held_teacher, keys + TILE::STREAMED_BYTES);
    engine.end(s, s_teacher);
    if (!view.whole) {
      view.hide(s, own_row - group_row, accumulator_column(lane));
      view.hide(s_teacher, own_row - group_row, accumulator_column(lane));
    }
    Sums sums[2];  // of this tile alone, so that rounding does not grow with the number of keys
#pragma unroll
    for (int n = 0; n < STREAMED / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float student = s[n][i] * p.scale - lse2[i / 2];
        const float teacher = s_teacher[n][i] * p.scale_teacher - lse2_teacher[i / 2];
        add_key<D>(sums[i / 2], student, teacher, p.log2_beta, p.log2_other);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      total[i].value += sums[i].value;
      total[i].statistic += sums[i].statistic;
      total[i].rest += sums[i].rest;
    }
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      total[i].value += shuffle_xor(total[i].value, lanes);
      total[i].statistic += shuffle_xor(total[i].statistic, lanes);
      total[i].rest += shuffle_xor(total[i].rest, lanes);
    }
    const int row = own_row + 8 * i;
    if (lane % 4 || place.first + row >= place.length) continue;
    const int at_row = head * layout.tokens + own_token + row;
    p.value[at_row] = keep[i] ? row_value<D>(total[i]) : 0.f;
    if (p.statistic) p.statistic[at_row] = keep[i] ? row_statistic<D>(total[i], p.log2_other) : 0.f;
  }
}
