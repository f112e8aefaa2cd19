// Value of the divergence and the row statistic that its backward needs, of a block's queries.
#pragma once

#include "attention_blocks.h"
#include "attention_divergence.h"
#include "attention_ring.h"
#include "sm90_engine.h"

// A block: its queries, and the keys [first, last) that it streams past them.
template <class TILE>
struct StatisticsBlock {
  Place place;
  int head, own_token, first, last;
  int key_head, key_head_teacher;
  bool exists;

  OISD_DEVICE explicit StatisticsBlock(const StatisticsParams& p) {
    const Layout& layout = p.layout;
    head = block_index() % layout.heads;
    // The last queries of a causal sequence have the most keys: they go first.
    const int index = layout.tiles[layout.sequences] - 1 - block_index() / layout.heads;
    exists = find_place(layout, index, TILE::OWN, place);
    if (!exists) return;
    own_token = place.begin + place.first;
    key_head = head / (layout.heads / layout.key_heads);
    key_head_teacher = head / (layout.heads / layout.key_heads_teacher);
    streamed_range<false, TILE::OWN, TILE::STREAMED>(layout, place, first, last);
    const auto kept = [&](int token) { return is_kept(p, token); };
    if (!any_live<TILE::OWN>(own_token, place.length - place.first, kept)) last = 0;
  }
  OISD_DEVICE static bool is_kept(const StatisticsParams& p, int token) {
    return p.keep == nullptr || p.keep[token] != 0;
  }
  OISD_DEVICE bool keeps(const StatisticsParams& p, int row) const {
    return place.first + row < place.length && is_kept(p, own_token + row);
  }
};

// What a lane knows of its two queries.
template <class ELEMENT, class TILE, Divergence D>
struct Statistics {
  static constexpr int STREAMED = TILE::STREAMED;
  static constexpr int ROWS = Engine<ELEMENT, TILE>::ROWS;
  using Held = typename Engine<ELEMENT, TILE>::Held;

  int lane, warp, own_row;  // of this lane's first query; the other is 8 rows further
  float lse2[2], lse2_teacher[2];
  bool keep[2];
  Sums total[2];

  OISD_DEVICE Statistics(const StatisticsParams& p, const StatisticsBlock<TILE>& block) {
    lane = thread_index() % WARP, warp = uniform(thread_index() / WARP);
    own_row = 16 * warp + accumulator_row(lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = own_row + 8 * i;
      keep[i] = block.keeps(p, row);
      const int at_row = block.head * p.layout.tokens + block.own_token + row;
      lse2[i] = keep[i] ? LOG2E * p.lse[at_row] : 0.f;
      lse2_teacher[i] = keep[i] ? LOG2E * p.lse_teacher[at_row] : 0.f;
    }
  }

  // The tile of keys whose first row is `first`, the teacher's behind the student's.
  OISD_DEVICE void add(const StatisticsParams& p, const Place& place,
                       const Engine<ELEMENT, TILE>& engine, int first, const Held& held,
                       const Held& held_teacher, unsigned keys) {
    const int group_row = 16 * warp / ROWS * ROWS;
    const View<false, ROWS, STREAMED> view(p.layout, place.length, place.first + group_row, first);
    if (view.hidden) return;
    float s[STREAMED / 8][4] = {}, s_teacher[STREAMED / 8][4] = {};
    engine.begin(s, s_teacher);
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

  OISD_DEVICE void store(const StatisticsParams& p, const StatisticsBlock<TILE>& block) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        total[i].value += shuffle_xor(total[i].value, lanes);
        total[i].statistic += shuffle_xor(total[i].statistic, lanes);
        total[i].rest += shuffle_xor(total[i].rest, lanes);
      }
      const int row = own_row + 8 * i;
      if (lane % 4 || block.place.first + row >= block.place.length) continue;
      const int at_row = block.head * p.layout.tokens + block.own_token + row;
      p.value[at_row] = keep[i] ? row_value<D>(total[i]) : 0.f;
      if (p.statistic)
        p.statistic[at_row] = keep[i] ? row_statistic<D>(total[i], p.log2_other) : 0.f;
    }
  }
};

// All threads copy, one tile ahead of what they multiply.
template <class ELEMENT, class TILE, Divergence D>
OISD_DEVICE void statistics_by_all(const StatisticsParams& p) {
  constexpr int OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  const StatisticsBlock<TILE> block(p);
  if (!block.exists) return;
  const Place& place = block.place;
  int next = block.first;
  const int last = block.last;

  const unsigned own = shared_base(), streamed = own + 2 * TILE::OWN_BYTES;
  const auto copy_keys = [&](int stage) {
    const unsigned to = streamed + stage * 2 * TILE::STREAMED_BYTES;
    const auto valid = [&](int row) { return next + row < place.length; };
    copy_tile<TILE, STREAMED>(to, p.k, block.key_head, place.begin + next, valid);
    copy_tile<TILE, STREAMED>(to + TILE::STREAMED_BYTES, p.k_teacher, block.key_head_teacher,
                              place.begin + next, valid);
  };

  const Engine<ELEMENT, TILE> engine(thread_index());
  typename decltype(engine)::Held held, held_teacher;
  Statistics<ELEMENT, TILE, D> statistics(p, block);
  if (next < last) {
    const auto valid = [&](int row) { return block.keeps(p, row); };
    copy_tile<TILE, OWN>(own, p.q, block.head, block.own_token, valid);
    copy_tile<TILE, OWN>(own + TILE::OWN_BYTES, p.q_teacher, block.head, block.own_token, valid);
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
    statistics.add(p, place, engine, first, held, held_teacher,
                   streamed + stage * 2 * TILE::STREAMED_BYTES);
  }
  statistics.store(p, block);
}

template <class TILE, class RING>
OISD_DEVICE void produce_statistics(const StatisticsParams& p, RING& ring) {
  constexpr int OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  const StatisticsBlock<TILE> block(p);
  if (!block.exists) return;
  const int lane = thread_index() % WARP;
  if (block.first < block.last && lane == 0) {
    const unsigned full = ring.own_full();
    barrier_expect(full, 2 * TILE::OWN_BYTES);
    copy_boxes<TILE, OWN>(ring.own, p.maps.q, block.head, block.own_token, full);
    copy_boxes<TILE, OWN>(ring.own + TILE::OWN_BYTES, p.maps.q_teacher, block.head,
                          block.own_token, full);
    barrier_arrive(full);
  }
  for (int first = block.first; first < block.last; first += STREAMED) {
    const int token = block.place.begin + first;
    ring.wait_empty();
    if (lane == 0) {
      const unsigned to = ring.tiles(), full = ring.full();
      barrier_expect(full, 2 * TILE::STREAMED_BYTES);
      copy_boxes<TILE, STREAMED>(to, p.maps.k, block.key_head, token, full);
      copy_boxes<TILE, STREAMED>(to + TILE::STREAMED_BYTES, p.maps.k_teacher,
                                 block.key_head_teacher, token, full);
    }
    ring.hand_over({first, true, {~0u, ~0u}});
  }
  ring.end();
}

// A warp copies, the owners multiply.
template <class ELEMENT, class TILE, Divergence D>
OISD_DEVICE void statistics_specialized(const StatisticsParams& p) {
  Ring<TILE, 2, false> ring;
  ring.create();
  if (uniform(thread_index() / WARP) >= TILE::WARPS) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (uniform(thread_index() / WARP) == TILE::WARPS) produce_statistics<TILE>(p, ring);
    return;
  }
  more_registers<OWNER_REGISTERS>();
  const StatisticsBlock<TILE> block(p);
  if (!block.exists) return;

  const Engine<ELEMENT, TILE> engine(thread_index());
  Statistics<ELEMENT, TILE, D> statistics(p, block);
  Note note = ring.wait_full();
  if (note.more()) barrier_wait(ring.own_full(), 0);
  // Nothing is cleared: a score that is NaN is hidden, or that of a row whose value is set to 0.
  while (note.more()) {
    statistics.add(p, block.place, engine, note.first, engine.hold(ring.own),
                   engine.hold(ring.own + TILE::OWN_BYTES), ring.tiles());
    ring.give_back();
    note = ring.wait_full();
  }
  statistics.store(p, block);
}

template <class ELEMENT, class TILE, Divergence D>
OISD_DEVICE void attention_statistics(const StatisticsParams& p) {
  if constexpr (TILE::SPECIALIZED)
    statistics_specialized<ELEMENT, TILE, D>(p);
  else
    statistics_by_all<ELEMENT, TILE, D>(p);
}
