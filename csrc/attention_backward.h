// Gradients of attention and of its alignment, with P recomputed once for both. Two kernels, so
// that no sum needs an atomic: KEYS gives dk and dv (own rows are keys, queries of all heads of the
// group stream past, scores are transposed), the other gives dq.
//
//   dS = P * (dP + E - delta),  dP = d_out v^T,  dv = P^T d_out,  dk = scale dS^T q,  dq = scale dS
//   k
//
// E is the alignment's (key_term), which starts the accumulator of dP; the forward KL's -g*T joins
// dS at the end. X is q and k, Y d_out and v. Where the queries of a tile all have weight 0, its
// teacher's scores are left out, and without Y (PLAIN false) all of it; single such queries read as
// 0.
#pragma once

#include "attention_divergence.h"
#include "attention_blocks.h"
#include "sm90_engine.h"

// The values of a query beside a tile in shared memory, each an array of the tile's rows.
enum RowValue { LSE2, LSE2_TEACHER, DELTA, FACTOR };

template <class TILE, bool PLAIN, bool ALIGN>
struct Tensors {
  static constexpr int COUNT = 1 + PLAIN + ALIGN, X = 0, Y = 1, TEACHER = 1 + PLAIN;
  static constexpr int OWN = COUNT * TILE::OWN_BYTES, STAGE = COUNT * TILE::STREAMED_BYTES;
};

// What a block walks over: tiles of streamed rows [begin, end), for each head in turn.
struct Walk {
  int head, heads, row, begin, end;
  bool aligned;  // a query of the tile has a weight
  OISD_DEVICE bool more() const { return head < heads; }
};

template <class ELEMENT, int HEAD>
OISD_DEVICE void store_rows(const Operand& to, int head, int token, int rows, int lane,
                            const float (&c)[HEAD / 8][4], float scale) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = accumulator_row(lane) + 8 * i;
    if (row >= rows) continue;
    unsigned short* data =
        static_cast<unsigned short*>(to.data) + (token + row) * to.row + head * to.head;
#pragma unroll
    for (int n = 0; n < HEAD / 8; n++)
      *reinterpret_cast<unsigned*>(data + 8 * n + accumulator_column(lane)) =
          pack(ELEMENT{}, scale * c[n][2 * i], scale * c[n][2 * i + 1]);
  }
}

template <class ELEMENT, class TILE, Divergence D, bool PLAIN, bool KEYS>
OISD_DEVICE void attention_backward(const BackwardParams& p) {
  constexpr int HEAD = TILE::HEAD, OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  constexpr bool ALIGN = D != NO_DIVERGENCE;
  using Memory = Tensors<TILE, PLAIN, ALIGN>;
  const Layout& layout = p.layout;
  const int blocks_heads = KEYS ? layout.key_heads : layout.heads;
  const int own_head = block_index() % blocks_heads;
  int index = block_index() / blocks_heads;
  // Causally the first keys and the last queries have the most to do: they go first.
  if (!KEYS) index = layout.tiles[layout.sequences] - 1 - index;
  Place place;
  if (!find_place(layout, index, OWN, place)) return;

  const int group = layout.heads / layout.key_heads;
  const int group_teacher = ALIGN ? layout.heads / layout.key_heads_teacher : 1;
  const int key_head = own_head / group,
            key_head_teacher = own_head / group_teacher;  // of a query's
  const int own_token = place.begin + place.first;
  const auto weighs = [&](int token) { return p.factor[token] != 0.f; };

  Walk walk;
  walk.head = KEYS ? own_head * group : own_head;
  walk.heads = walk.head + (KEYS ? group : 1);
  streamed_range<KEYS, OWN, STREAMED>(layout, place, walk.begin, walk.end);
  walk.row = walk.begin;
  walk.aligned = ALIGN;
  if (ALIGN && !KEYS) {
    walk.aligned = any_live<OWN>(own_token, place.length - place.first, weighs);
    if (!PLAIN && !walk.aligned) walk.heads = walk.head;
  }
  const auto settle = [&] {
    while (walk.more()) {
      if (walk.row >= walk.end) {
        walk.head++;
        walk.row = walk.begin;
      } else {
        if (ALIGN && KEYS)
          walk.aligned =
              any_live<STREAMED>(place.begin + walk.row, place.length - walk.row, weighs);
        if (PLAIN || walk.aligned) return;
        walk.row += STREAMED;
      }
    }
  };
  settle();

  const unsigned own = shared_base(), streamed = own + Memory::OWN;
  const unsigned row_values = streamed + STAGES * Memory::STAGE;
  const Operand &own_x = KEYS ? p.k : p.q, &own_y = KEYS ? p.v : p.d_out;
  const Operand& own_teacher = KEYS ? p.k_teacher : p.q_teacher;
  const Operand &streamed_x = KEYS ? p.q : p.k, &streamed_y = KEYS ? p.d_out : p.v;
  const Operand& streamed_teacher = KEYS ? p.q_teacher : p.k_teacher;

  const auto copy_streamed = [&](int stage) {
    const unsigned to = streamed + stage * Memory::STAGE;
    const int token = place.begin + walk.row;
    const int rows = place.length - walk.row, head = KEYS ? walk.head : key_head;
    const auto exists = [&](int row) { return row < rows; };
    const auto live = [&](int row) { return row < rows && (!KEYS || weighs(token + row)); };
    if constexpr (PLAIN) {
      copy_tile<TILE, STREAMED>(to, streamed_x, head, token, exists);
      copy_tile<TILE, STREAMED>(to + Memory::Y * TILE::STREAMED_BYTES, streamed_y, head, token,
                                exists);
    } else {
      copy_tile<TILE, STREAMED>(to, streamed_x, head, token, live);
    }
    if (ALIGN && walk.aligned)
      copy_tile<TILE, STREAMED>(to + Memory::TEACHER * TILE::STREAMED_BYTES, streamed_teacher,
                                KEYS ? walk.head : key_head_teacher, token, live);
    if constexpr (KEYS) {
      const int thread = fresh_thread_index();
      const int value = thread / STREAMED, row = thread % STREAMED;
      if (value < ROW_VALUES && (ALIGN || value == LSE2 || value == DELTA)) {
        const float* from = value == LSE2     ? p.lse2
                            : value == DELTA  ? p.delta
                            : value == FACTOR ? p.factor
                                              : p.lse2_teacher;
        const int line = value == FACTOR ? 0 : walk.head * layout.tokens;
        const bool valid = row < rows;
        copy_async_4(row_values + ((stage * ROW_VALUES + value) * STREAMED + row) * 4,
                     from + (valid ? line + token + row : 0), valid);
      }
    }
    copy_async_commit();
  };

  constexpr int ROWS = Engine<ELEMENT, TILE>::ROWS;
  float lse2[2], lse2_teacher[2], delta[2], factor[2];  // of this lane's own queries
  if constexpr (!KEYS) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = thread_index() / WARP * 16 + accumulator_row(thread_index() % WARP) + 8 * i;
      const bool exists = place.first + row < place.length;
      const int from = own_head * layout.tokens + own_token + row;
      lse2[i] = exists ? p.lse2[from] : 0.f;
      delta[i] = exists ? p.delta[from] : 0.f;
      lse2_teacher[i] = ALIGN && exists ? p.lse2_teacher[from] : 0.f;
      factor[i] = ALIGN && exists ? p.factor[own_token + row] : 0.f;
    }
  }

  if (walk.more()) {
    const auto exists = [&](int row) { return place.first + row < place.length; };
    const auto live = [&](int row) { return exists(row) && (KEYS || weighs(own_token + row)); };
    if constexpr (PLAIN) {
      copy_tile<TILE, OWN>(own, own_x, own_head, own_token, exists);
      copy_tile<TILE, OWN>(own + Memory::Y * TILE::OWN_BYTES, own_y, own_head, own_token, exists);
    } else {
      copy_tile<TILE, OWN>(own, own_x, own_head, own_token, live);
    }
    if constexpr (ALIGN)
      copy_tile<TILE, OWN>(own + Memory::TEACHER * TILE::OWN_BYTES, own_teacher,
                           KEYS ? walk.head / group_teacher : own_head, own_token, live);
    copy_streamed(0);
  }

  float d_x[HEAD / 8][4] = {};                      // dk or dq
  float d_y[KEYS && PLAIN ? HEAD / 8 : 1][4] = {};  // dv
  for (int stage = 0; walk.more(); stage ^= 1) {
    const Engine<ELEMENT, TILE> engine(fresh_thread_index());
    copy_async_wait_all();
    engine.arrived();
    barrier();
    const int first = walk.row;
    const bool aligned = walk.aligned;
    walk.row += STREAMED;
    settle();
    if (walk.more()) copy_streamed(stage ^ 1);

    const int group_row = uniform(fresh_thread_index() / WARP) * 16 / ROWS * ROWS;
    const View<KEYS, ROWS, STREAMED> view(layout, place.length, place.first + group_row, first);
    if (view.hidden) continue;
    const unsigned tiles = streamed + stage * Memory::STAGE;
    const unsigned tiles_y = tiles + Memory::Y * TILE::STREAMED_BYTES;
    float s[STREAMED / 8][4] = {};   // scores, then P
    float dp[STREAMED / 8][4] = {};  // the teacher's scores, then dP + E - delta, then dS
    float gt[D == FORWARD_KL ? STREAMED / 8 : 1][4];
    engine.begin();
    engine.scores(s, own, tiles);
    if (ALIGN && aligned)
      engine.scores(dp, own + Memory::TEACHER * TILE::OWN_BYTES,
                    tiles + Memory::TEACHER * TILE::STREAMED_BYTES);
    engine.end(s, dp);
    const int thread = fresh_thread_index(), column0 = accumulator_column(thread % WARP);
    if (!view.whole) {
      const int row0 = (thread / WARP * 16 + accumulator_row(thread % WARP)) % ROWS;
      view.hide(s, row0, column0);
      if constexpr (ALIGN) view.hide(dp, row0, column0);
    }

#pragma unroll
    for (int n = 0; n < STREAMED / 8; n++) {
      const int column = 8 * n + column0;
      Pair beside[ROW_VALUES] = {};
      if constexpr (KEYS) {
#pragma unroll
        for (int value = 0; value < ROW_VALUES; value++)
          if (ALIGN || value == LSE2 || value == DELTA)
            beside[value] = load_shared_pair(
                row_values + ((stage * ROW_VALUES + value) * STREAMED + column) * 4);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const auto of = [&](const float (&own_values)[2], RowValue value) {
          return KEYS ? (i % 2 ? beside[value].y : beside[value].x) : own_values[i / 2];
        };
        const float student = s[n][i] * p.scale2 - of(lse2, LSE2);
        s[n][i] = exp2_of(student);
        float start = -of(delta, DELTA);
        if constexpr (ALIGN) {
          const float teacher = dp[n][i] * p.scale2_teacher - of(lse2_teacher, LSE2_TEACHER);
          const float weight = of(factor, FACTOR);
          start += key_term<D>(student, teacher, weight, p.log2_ratio);
          if constexpr (D == FORWARD_KL) gt[n][i] = weight * exp2_of(teacher);
        }
        dp[n][i] = start;
      }
    }
    unsigned left[STREAMED / 16][4];
    if constexpr (PLAIN && KEYS) {
      round_to_left<ELEMENT, STREAMED>(left, s);
      engine.begin();
      engine.rows(d_y, left, tiles_y);
      engine.end(d_y, left);
    }
    if constexpr (PLAIN) {
      engine.begin();
      engine.scores(dp, own + Memory::Y * TILE::OWN_BYTES, tiles_y);
      engine.end(dp);
    }
#pragma unroll
    for (int n = 0; n < STREAMED / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        dp[n][i] = s[n][i] * dp[n][i] - (D == FORWARD_KL ? gt[D == FORWARD_KL ? n : 0][i] : 0.f);
    round_to_left<ELEMENT, STREAMED>(left, dp);
    engine.begin();
    engine.rows(d_x, left, tiles);
    engine.end(d_x, left);
  }

  const float scale = p.gradient_scale ? p.scale / *p.gradient_scale : p.scale;
  const int thread = fresh_thread_index(), lane = thread % WARP, row = thread / WARP * 16;
  const int rows = place.length - place.first - row;
  store_rows<ELEMENT, HEAD>(KEYS ? p.d_key : p.d_query, own_head, own_token + row, rows, lane, d_x,
                            scale);
  if constexpr (KEYS && PLAIN)
    store_rows<ELEMENT, HEAD>(p.d_value, own_head, own_token + row, rows, lane, d_y, 1.f);
}
