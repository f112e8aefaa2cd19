// What a streamed tile adds to the gradients of a block's own rows, with P recomputed once for
// attention and for its alignment. KEYS: own rows are keys, gradients dk and dv, queries of all
// heads of the group stream past, scores are transposed; otherwise dq.
//
//   dP = d_out v^T,  dS = P * (dP + E - delta)
//   dv = P^T d_out,  dk = scale dS^T q,  dq = scale dS k
//
// E is the alignment's (key_term), which starts the accumulator of dP; the forward KL's -g*T joins
// dS at the end. X is q and k, Y d_out and v.
#pragma once

#include "attention_blocks.h"
#include "attention_divergence.h"
#include "sm90_engine.h"

// The values of a query beside a tile in shared memory, each an array of the tile's rows.
enum RowValue { LSE2, LSE2_TEACHER, DELTA, FACTOR };

template <class TILE, bool PLAIN, bool ALIGN>
struct Tensors {
  static constexpr int COUNT = 1 + PLAIN + ALIGN, X = 0, Y = 1, TEACHER = 1 + PLAIN;
  static constexpr int OWN = COUNT * TILE::OWN_BYTES, STAGE = COUNT * TILE::STREAMED_BYTES;
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
struct Gradients {
  static constexpr int HEAD = TILE::HEAD, STREAMED = TILE::STREAMED;
  static constexpr bool ALIGN = D != NO_DIVERGENCE;
  static constexpr int ROWS = Engine<ELEMENT, TILE>::ROWS;
  // Of the forward KL alone the teacher's part is a summand of dS, and is computed last, when P's
  // registers are free.
  static constexpr bool LATE = D == FORWARD_KL;
  using Memory = Tensors<TILE, PLAIN, ALIGN>;

  float d_x[HEAD / 8][4] = {};  // of q or k
  float d_y[KEYS && PLAIN ? HEAD / 8 : 1][4] = {};
  float lse2[2], lse2_teacher[2], delta[2], factor[2];  // of this lane's own queries

  OISD_DEVICE Gradients(const BackwardParams& p, const Place& place, int own_head) {
    if constexpr (!KEYS) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row =
            thread_index() / WARP * 16 + accumulator_row(thread_index() % WARP) + 8 * i;
        const bool exists = place.first + row < place.length;
        const int token = place.begin + place.first + row;
        const int from = own_head * p.layout.tokens + token;
        lse2[i] = exists ? p.lse2[from] : 0.f;
        delta[i] = exists ? p.delta[from] : 0.f;
        lse2_teacher[i] = ALIGN && exists ? p.lse2_teacher[from] : 0.f;
        factor[i] = ALIGN && exists ? p.factor[token] : 0.f;
      }
    }
  }

  // The streamed tile whose first row is `first`, with its rows' values at `row_values` (KEYS);
  // `aligned`: the teacher's tiles are there, too.
  OISD_DEVICE void add(const BackwardParams& p, const Place& place,
                       const Engine<ELEMENT, TILE>& engine, int first, bool aligned, unsigned own,
                       unsigned tiles, unsigned row_values) {
    const int group_row = uniform(fresh_thread_index() / WARP) * 16 / ROWS * ROWS;
    const View<KEYS, ROWS, STREAMED> view(p.layout, place.length, place.first + group_row, first);
    if (view.hidden) return;
    const unsigned tiles_y = tiles + Memory::Y * TILE::STREAMED_BYTES;
    const unsigned own_y = own + Memory::Y * TILE::OWN_BYTES;
    const unsigned tiles_teacher = tiles + Memory::TEACHER * TILE::STREAMED_BYTES;
    const unsigned own_teacher = own + Memory::TEACHER * TILE::OWN_BYTES;
    const int thread = fresh_thread_index(), column0 = accumulator_column(thread % WARP);
    const int row0 = (thread / WARP * 16 + accumulator_row(thread % WARP)) % ROWS;

    float s[STREAMED / 8][4] = {};   // scores, then P
    float dp[STREAMED / 8][4] = {};  // the teacher's scores, then dP + E - delta, then dS
    engine.begin(s, dp);
    engine.scores(s, own, tiles);
    if constexpr (PLAIN && LATE) engine.scores(dp, own_y, tiles_y);
    if (ALIGN && !LATE && aligned) {
      engine.begin(dp);
      engine.scores(dp, own_teacher, tiles_teacher);
    }
    engine.end(s, dp);
    if (!view.whole) {
      view.hide(s, row0, column0);
      if constexpr (ALIGN && !LATE) view.hide(dp, row0, column0);
    }
#pragma unroll
    for (int n = 0; n < STREAMED / 8; n++) {
      const RowValues of(*this, row_values, 8 * n + column0, true, ALIGN && !LATE);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float student = s[n][i] * p.scale2 - of(LSE2, i), start = -of(DELTA, i);
        s[n][i] = exp2_of(student);
        if constexpr (LATE) {
          dp[n][i] = s[n][i] * (dp[n][i] + start);
        } else if constexpr (ALIGN) {
          const float teacher = dp[n][i] * p.scale2_teacher - of(LSE2_TEACHER, i);
          dp[n][i] = start + key_term<D>(student, teacher, of(FACTOR, i), p.log2_ratio);
        } else {
          dp[n][i] = start;
        }
      }
    }
    unsigned left[STREAMED / 16][4];
    if constexpr (PLAIN && KEYS) {
      round_to_left<ELEMENT, STREAMED>(left, s);
      engine.begin(d_y, left);
      engine.rows(d_y, left, tiles_y);
      engine.end(d_y, left);
    }
    if constexpr (PLAIN && !LATE) {
      engine.begin(dp);
      engine.scores(dp, own_y, tiles_y);
      engine.end(dp);
    }
    if constexpr (!LATE) {
#pragma unroll
      for (int n = 0; n < STREAMED / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dp[n][i] *= s[n][i];
    } else if (aligned) {
      float s_teacher[STREAMED / 8][4] = {};
      engine.begin(s_teacher);
      engine.scores(s_teacher, own_teacher, tiles_teacher);
      engine.end(s_teacher);
      if (!view.whole) view.hide(s_teacher, row0, column0);
#pragma unroll
      for (int n = 0; n < STREAMED / 8; n++) {
        const RowValues of(*this, row_values, 8 * n + column0, false, true);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float teacher = s_teacher[n][i] * p.scale2_teacher - of(LSE2_TEACHER, i);
          dp[n][i] -= of(FACTOR, i) * exp2_of(teacher);
        }
      }
    }
    round_to_left<ELEMENT, STREAMED>(left, dp);
    engine.begin(d_x, left);
    engine.rows(d_x, left, tiles);
    engine.end(d_x, left);
  }

  // Of the queries that accumulators meet: this lane's own ones, or those of a streamed tile's
  // columns.
  struct RowValues {
    const Gradients& own;
    Pair beside[ROW_VALUES] = {};

    OISD_DEVICE RowValues(const Gradients& own, unsigned row_values, int column, bool student,
                          bool teacher)
        : own(own) {
      if constexpr (KEYS) {
#pragma unroll
        for (int value = 0; value < ROW_VALUES; value++)
          if (value == LSE2 || value == DELTA ? student : teacher)
            beside[value] = load_shared_pair(row_values + (value * STREAMED + column) * 4);
      }
    }
    OISD_DEVICE float operator()(RowValue value, int i) const {
      if (KEYS) return i % 2 ? beside[value].y : beside[value].x;
      const int row = i / 2;
      return value == LSE2           ? own.lse2[row]
             : value == LSE2_TEACHER ? own.lse2_teacher[row]
             : value == DELTA        ? own.delta[row]
                                     : own.factor[row];
    }
  };

  OISD_DEVICE void store(const BackwardParams& p, const Place& place, int own_head) const {
    const float scale = p.gradient_scale ? p.scale / *p.gradient_scale : p.scale;
    const int thread = fresh_thread_index(), lane = thread % WARP, row = thread / WARP * 16;
    const int rows = place.length - place.first - row, token = place.begin + place.first + row;
    store_rows<ELEMENT, HEAD>(KEYS ? p.d_key : p.d_query, own_head, token, rows, lane, d_x, scale);
    if constexpr (KEYS && PLAIN)
      store_rows<ELEMENT, HEAD>(p.d_value, own_head, token, rows, lane, d_y, 1.f);
  }
};
