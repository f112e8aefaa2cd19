// Gradients of attention and of its alignment (attention_gradients.h). Two kernels, so that no sum
// needs an atomic: KEYS gives dk and dv, the other gives dq.
//
// Where the queries of a tile all have weight 0, its teacher's scores are left out, and without Y
// (PLAIN false) all of it; single such queries read as 0.
#pragma once

#include "attention_gradients.h"
#include "attention_ring.h"

// A block of a backward kernel: what it owns, whose heads it reads.
template <class TILE, bool PLAIN, bool ALIGN, bool KEYS>
struct BackwardBlock {
  Place place;
  int own_head, own_token;
  int group, group_teacher;  // query heads of a key head
  bool exists;

  OISD_DEVICE explicit BackwardBlock(const Layout& layout) {
    const int heads = KEYS ? layout.key_heads : layout.heads;
    own_head = block_index() % heads;
    int index = block_index() / heads;
    // Causally the first keys and the last queries have the most to do: they go first.
    if (!KEYS) index = layout.tiles[layout.sequences] - 1 - index;
    exists = find_place(layout, index, TILE::OWN, place);
    group = layout.heads / layout.key_heads;
    group_teacher = ALIGN ? layout.heads / layout.key_heads_teacher : 1;
    own_token = place.begin + place.first;
  }
  OISD_DEVICE int own_head_teacher() const {
    return KEYS ? own_head * group / group_teacher : own_head;
  }
  // Of the streamed tensors, while the walk is at query head `head`.
  OISD_DEVICE int streamed_head(int head) const { return KEYS ? head : own_head / group; }
  OISD_DEVICE int streamed_head_teacher(int head) const {
    return KEYS ? head : own_head / group_teacher;
  }
};

OISD_DEVICE bool weighs(const BackwardParams& p, int token) { return p.factor[token] != 0.f; }

// What a block walks over: tiles of streamed rows [begin, end), for each head in turn.
template <class TILE, bool PLAIN, bool ALIGN, bool KEYS>
struct Walk {
  int head, heads, row, begin, end;
  bool aligned;  // a query of the tile has a weight

  OISD_DEVICE Walk(const BackwardParams& p,
                   const BackwardBlock<TILE, PLAIN, ALIGN, KEYS>& block) {
    const Place& place = block.place;
    head = KEYS ? block.own_head * block.group : block.own_head;
    heads = head + (KEYS ? block.group : 1);
    streamed_range<KEYS, TILE::OWN, TILE::STREAMED>(p.layout, place, begin, end);
    row = begin;
    aligned = ALIGN;
    if (ALIGN && !KEYS) {
      aligned = any_live<TILE::OWN>(block.own_token, place.length - place.first,
                                    [&](int token) { return weighs(p, token); });
      if (!PLAIN && !aligned) heads = head;
    }
    settle(p, place);
  }
  OISD_DEVICE bool more() const { return head < heads; }
  OISD_DEVICE void step(const BackwardParams& p, const Place& place) {
    row += TILE::STREAMED;
    settle(p, place);
  }

 private:
  OISD_DEVICE void settle(const BackwardParams& p, const Place& place) {
    while (more()) {
      if (row >= end) {
        head++;
        row = begin;
      } else {
        if (ALIGN && KEYS)
          aligned = any_live<TILE::STREAMED>(place.begin + row, place.length - row,
                                             [&](int token) { return weighs(p, token); });
        if (PLAIN || aligned) return;
        row += TILE::STREAMED;
      }
    }
  }
};

// Where the row value `value` of the tile at `token` begins.
OISD_DEVICE const float* row_values_of(const BackwardParams& p, int value, int head, int token) {
  const float* from = value == LSE2     ? p.lse2
                      : value == DELTA  ? p.delta
                      : value == FACTOR ? p.factor
                                        : p.lse2_teacher;
  return from + (value == FACTOR ? 0 : head * p.layout.tokens) + token;
}

// All threads copy, one tile ahead of what they multiply.
template <class ELEMENT, class TILE, Divergence D, bool PLAIN, bool KEYS>
OISD_DEVICE void backward_by_all(const BackwardParams& p) {
  constexpr int OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  constexpr bool ALIGN = D != NO_DIVERGENCE;
  using Memory = Tensors<TILE, PLAIN, ALIGN>;
  const BackwardBlock<TILE, PLAIN, ALIGN, KEYS> block(p.layout);
  if (!block.exists) return;
  const Place& place = block.place;
  Walk<TILE, PLAIN, ALIGN, KEYS> walk(p, block);

  const unsigned own = shared_base(), streamed = own + Memory::OWN;
  const unsigned row_values = streamed + STAGES * Memory::STAGE;
  const auto copy_streamed = [&](int stage) {
    const unsigned to = streamed + stage * Memory::STAGE;
    const int token = place.begin + walk.row, rows = place.length - walk.row;
    const int head = block.streamed_head(walk.head);
    const auto exists = [&](int row) { return row < rows; };
    const auto live = [&](int row) { return row < rows && (!KEYS || weighs(p, token + row)); };
    if constexpr (PLAIN) {
      copy_tile<TILE, STREAMED>(to, KEYS ? p.q : p.k, head, token, exists);
      copy_tile<TILE, STREAMED>(to + Memory::Y * TILE::STREAMED_BYTES, KEYS ? p.d_out : p.v, head,
                                token, exists);
    } else {
      copy_tile<TILE, STREAMED>(to, KEYS ? p.q : p.k, head, token, live);
    }
    if (ALIGN && walk.aligned)
      copy_tile<TILE, STREAMED>(to + Memory::TEACHER * TILE::STREAMED_BYTES,
                                KEYS ? p.q_teacher : p.k_teacher,
                                block.streamed_head_teacher(walk.head), token, live);
    if constexpr (KEYS) {
      const int thread = fresh_thread_index();
      const int value = thread / STREAMED, row = thread % STREAMED;
      if (value < ROW_VALUES && (ALIGN || value == LSE2 || value == DELTA)) {
        const bool valid = row < rows;
        const float* from = row_values_of(p, value, walk.head, token);
        copy_async_4(row_values + stage * TILE::VALUE_BYTES + (value * STREAMED + row) * 4,
                     from + (valid ? row : 0), valid);
      }
    }
  };

  Gradients<ELEMENT, TILE, D, PLAIN, KEYS> gradients(p, place, block.own_head);
  if (walk.more()) {
    const int token = block.own_token;
    const auto exists = [&](int row) { return place.first + row < place.length; };
    const auto live = [&](int row) { return exists(row) && (KEYS || weighs(p, token + row)); };
    if constexpr (PLAIN) {
      copy_tile<TILE, OWN>(own, KEYS ? p.k : p.q, block.own_head, token, exists);
      copy_tile<TILE, OWN>(own + Memory::Y * TILE::OWN_BYTES, KEYS ? p.v : p.d_out, block.own_head,
                           token, exists);
    } else {
      copy_tile<TILE, OWN>(own, KEYS ? p.k : p.q, block.own_head, token, live);
    }
    if constexpr (ALIGN)
      copy_tile<TILE, OWN>(own + Memory::TEACHER * TILE::OWN_BYTES,
                           KEYS ? p.k_teacher : p.q_teacher, block.own_head_teacher(), token, live);
    copy_streamed(0);
  }
  for (int stage = 0; walk.more(); stage ^= 1) {
    const Engine<ELEMENT, TILE> engine(fresh_thread_index());
    copy_async_wait_all();
    engine.arrived();
    barrier();
    const int first = walk.row;
    const bool aligned = walk.aligned;
    walk.step(p, place);
    if (walk.more()) copy_streamed(stage ^ 1);
    gradients.add(p, place, engine, first, aligned, own, streamed + stage * Memory::STAGE,
                  row_values + stage * TILE::VALUE_BYTES);
  }
  gradients.store(p, place, block.own_head);
}

// The producer's part: the own tiles, then the streamed ones in the walk's order.
template <class TILE, bool PLAIN, bool ALIGN, bool KEYS, class RING>
OISD_DEVICE void produce_backward(const BackwardParams& p, RING& ring) {
  constexpr int OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  using Memory = Tensors<TILE, PLAIN, ALIGN>;
  const BackwardBlock<TILE, PLAIN, ALIGN, KEYS> block(p.layout);
  if (!block.exists) return;
  const Place& place = block.place;
  const BackwardMaps& maps = p.maps;
  const int lane = thread_index() % WARP;
  Walk<TILE, PLAIN, ALIGN, KEYS> walk(p, block);
  if (walk.more() && lane == 0) {
    const unsigned full = ring.own_full();
    barrier_expect(full, Memory::OWN);
    copy_boxes<TILE, OWN>(ring.own, KEYS ? maps.k : maps.q, block.own_head, block.own_token, full);
    if constexpr (PLAIN)
      copy_boxes<TILE, OWN>(ring.own + Memory::Y * TILE::OWN_BYTES, KEYS ? maps.v : maps.d_out,
                            block.own_head, block.own_token, full);
    if constexpr (ALIGN)
      copy_boxes<TILE, OWN>(ring.own + Memory::TEACHER * TILE::OWN_BYTES,
                            KEYS ? maps.k_teacher : maps.q_teacher, block.own_head_teacher(),
                            block.own_token, full);
    barrier_arrive(full);
  }
  for (; walk.more(); walk.step(p, place)) {
    const int token = place.begin + walk.row, rows = place.length - walk.row;
    ring.wait_empty();
    if (lane == 0) {
      const unsigned to = ring.tiles(), full = ring.full();
      const int head = block.streamed_head(walk.head);
      const bool teacher = ALIGN && walk.aligned;
      barrier_expect(full, (1 + PLAIN + teacher) * TILE::STREAMED_BYTES);
      copy_boxes<TILE, STREAMED>(to, KEYS ? maps.q : maps.k, head, token, full);
      if constexpr (PLAIN)
        copy_boxes<TILE, STREAMED>(to + Memory::Y * TILE::STREAMED_BYTES,
                                   KEYS ? maps.d_out : maps.v, head, token, full);
      if (teacher)
        copy_boxes<TILE, STREAMED>(to + Memory::TEACHER * TILE::STREAMED_BYTES,
                                   KEYS ? maps.q_teacher : maps.k_teacher,
                                   block.streamed_head_teacher(walk.head), token, full);
    }
    Note note{walk.row, walk.aligned, {}};
    if constexpr (KEYS) {
#pragma unroll 1
      for (int value = 0; value < ROW_VALUES; value++) {
        if (!ALIGN && value != LSE2 && value != DELTA) continue;
        const float* from = row_values_of(p, value, walk.head, token);
#pragma unroll 1
        for (int row = lane; row < STREAMED; row += WARP)
          copy_async_4(ring.values() + (value * STREAMED + row) * 4, from + (row < rows ? row : 0),
                       row < rows);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = lane + i * WARP;
      note.live[i] = votes_of_warp(row < rows && (!ALIGN || !KEYS || weighs(p, token + row)));
    }
    ring.hand_over(note);
  }
  ring.end();
}

// A warp copies, the owners multiply.
template <class ELEMENT, class TILE, Divergence D, bool PLAIN, bool KEYS>
OISD_DEVICE void backward_specialized(const BackwardParams& p) {
  constexpr int OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  constexpr bool ALIGN = D != NO_DIVERGENCE;
  using Memory = Tensors<TILE, PLAIN, ALIGN>;
  Ring<TILE, Memory::COUNT, KEYS> ring;
  ring.create();
  // What follows is computed in each role anew: the producer has few registers.
  if (uniform(thread_index() / WARP) >= TILE::WARPS) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (uniform(thread_index() / WARP) == TILE::WARPS)
      produce_backward<TILE, PLAIN, ALIGN, KEYS>(p, ring);
    return;
  }
  more_registers<OWNER_REGISTERS>();
  const BackwardBlock<TILE, PLAIN, ALIGN, KEYS> block(p.layout);
  if (!block.exists) return;
  const Place& place = block.place;

  Gradients<ELEMENT, TILE, D, PLAIN, KEYS> gradients(p, place, block.own_head);
  Note note = ring.wait_full();
  if (note.more()) {
    barrier_wait(ring.own_full(), 0);
    if constexpr (ALIGN && !KEYS) {  // other own rows that are NaN stay so, and are not stored
      const auto live = [&](int row) {
        return place.first + row < place.length && weighs(p, block.own_token + row);
      };
      if constexpr (!PLAIN) clear_rows<TILE, OWN>(ring.own, live);
      clear_rows<TILE, OWN>(ring.own + Memory::TEACHER * TILE::OWN_BYTES, live);
      meet_after_clearing<TILE>();
    }
  }
  while (note.more()) {
    const int rows = place.length - note.first;
    const bool cut = rows < STREAMED;
    const bool dropped = KEYS && note.aligned && (note.live[0] & note.live[1]) != ~0u;
    if (cut || dropped) {
      const auto exists = [&](int row) { return row < rows; };
      const auto live = [&](int row) { return note.lives(row); };
      if constexpr (PLAIN) {
        clear_rows<TILE, STREAMED>(ring.tiles(), exists);
        clear_rows<TILE, STREAMED>(ring.tiles() + Memory::Y * TILE::STREAMED_BYTES, exists);
      } else {
        clear_rows<TILE, STREAMED>(ring.tiles(), live);
      }
      if (KEYS && note.aligned)  // scores of keys that are not there are hidden
        clear_rows<TILE, STREAMED>(ring.tiles() + Memory::TEACHER * TILE::STREAMED_BYTES, live);
      meet_after_clearing<TILE>();
    }
    gradients.add(p, place, Engine<ELEMENT, TILE>(fresh_thread_index()), note.first, note.aligned,
                  ring.own, ring.tiles(), ring.values());
    ring.give_back();
    note = ring.wait_full();
  }
  gradients.store(p, place, block.own_head);
}

template <class ELEMENT, class TILE, Divergence D, bool PLAIN, bool KEYS>
OISD_DEVICE void attention_backward(const BackwardParams& p) {
  if constexpr (TILE::SPECIALIZED)
    backward_specialized<ELEMENT, TILE, D, PLAIN, KEYS>(p);
  else
    backward_by_all<ELEMENT, TILE, D, PLAIN, KEYS>(p);
}
