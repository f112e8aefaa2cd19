// A block's place among packed sequences, its copies into shared memory, and what it sees.
#pragma once

#include "attention_params.h"
#include "attention_tiles.h"
#include "primitives.h"

OISD_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

constexpr float HIDDEN = -1e20f;  // finite, so that differences are no NaN

// Where a block's own rows lie.
struct Place {
  int begin;   // of the sequence, in tokens
  int length;  // of the sequence
  int first;   // the block's first row, counted in the sequence
};

// Tile `index` of all sequences' tiles; false where there are fewer.
OISD_DEVICE bool find_place(const Layout& layout, int index, int own, Place& place) {
  if (index < 0 || index >= layout.tiles[layout.sequences]) return false;
  int low = 0, high = layout.sequences;  // tiles[low] <= index < tiles[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (layout.tiles[middle] <= index ? low : high) = middle;
  }
  place.begin = layout.cu_seqlens[low];
  place.length = layout.cu_seqlens[low + 1] - layout.cu_seqlens[low];
  place.first = (index - layout.tiles[low]) * own;
  return true;
}

// For use in a loop: what follows from it is computed anew and fills no registers meanwhile.
OISD_DEVICE unsigned fresh_thread_index() {
  unsigned thread = thread_index();
  keep_in_place(thread);
  return thread;
}

// Starts the copy of `ROWS` rows from token `token` on; rows that are not `valid(row)` become zero.
template <class TILE, int ROWS, class Valid>
OISD_DEVICE void copy_tile(unsigned to, const Operand& from, int head, int token,
                           const Valid& valid) {
  constexpr int CHUNKS = TILE::HEAD / CHUNK, STEP = TILE::OWNERS / CHUNKS;
  const unsigned thread = fresh_thread_index();
  const int chunk = thread % CHUNKS, start = thread / CHUNKS;
  const auto* data = static_cast<const unsigned short*>(from.data);
  const auto* next = data + (token + start) * from.row + head * from.head + chunk * CHUNK;
  const long long step = STEP * from.row;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; i++, next += step) {
    const int row = start + i * STEP;
    const bool is_valid = valid(row);
    copy_async_16(to + tile_offset<ROWS>(row, chunk), is_valid ? next : data, is_valid);
  }
}

// How the ROWS own rows from `own` on and the streamed rows from `streamed` on see each other.
// KEYS: the own rows are keys.
template <bool KEYS, int ROWS, int STREAMED>
struct View {
  bool hidden, whole;  // no pair is seen; all are
  int own, streamed, length, left, right;

  OISD_DEVICE View(const Layout& layout, int length, int own, int streamed)
      : own(own), streamed(streamed), length(length), left(layout.left), right(layout.right) {
    const int last_own = own + ROWS - 1, last_streamed = streamed + STREAMED - 1;
    const int least = KEYS ? own - last_streamed : streamed - last_own;  // key minus query
    const int most = KEYS ? last_own - streamed : last_streamed - own;
    hidden = most < -left || least > right || own >= length || streamed >= length;
    whole = least >= -left && most <= right && last_own < length && last_streamed < length;
  }
  OISD_DEVICE bool sees(int row, int column) const {
    const int r = own + row, c = streamed + column, ahead = KEYS ? r - c : c - r;
    return ahead >= -left && ahead <= right && r < length && c < length;
  }
  // Scores that are not to be seen become so low that their probability is 0.
  OISD_DEVICE void hide(float (&scores)[STREAMED / 8][4], int row, int column) const {
#pragma unroll
    for (int n = 0; n < STREAMED / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (!sees(row + 8 * (i / 2), 8 * n + column + i % 2)) scores[n][i] = HIDDEN;
  }
};

// Streamed rows [first, last) that some row of the own tile sees; `first` is a multiple of
// STREAMED.
template <bool KEYS, int OWN, int STREAMED>
OISD_DEVICE void streamed_range(const Layout& layout, const Place& place, int& first, int& last) {
  const int before = KEYS ? layout.right : layout.left, after = KEYS ? layout.left : layout.right;
  const int end = smaller(place.first + OWN, place.length);
  first = place.first > before ? (place.first - before) / STREAMED * STREAMED : 0;
  last = smaller(end + after, place.length);
}

// Whether any of `ROWS` rows from `token` on has `live(token)`; `rows` of them exist.
template <int ROWS, class Live>
OISD_DEVICE bool any_live(int token, int rows, const Live& live) {
  const int lane = fresh_thread_index() % WARP;
  bool any = false;
#pragma unroll
  for (int i = 0; i < ROWS; i += WARP) {
    const int row = i + lane;
    any |= row < ROWS && row < rows && live(token + row);
  }
  return any_of_warp(any);
}
