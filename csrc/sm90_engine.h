// The products of a warpgroup's 64 rows with a tile, by wgmma, whose operands lie in shared memory
// or (left) in registers. Tiles are stored with its 128-byte swizzle.
#pragma once

#include "sm80_engine.h"

// A matrix descriptor: address, stride between eight rows and, where the instruction needs more
// than 64 columns of what is contiguous, stride between the halves.
OISD_DEVICE unsigned long long describe(unsigned address, int half_bytes = 0) {
  constexpr unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 8 * ROW_BYTES / 16;
  return SWIZZLE_128 | EIGHT_ROWS << 32 | static_cast<unsigned long long>(half_bytes / 16) << 16 |
         (address & 0x3ffff) / 16;
}

template <class ELEMENT, class TILE>
struct Engine<ELEMENT, TILE, WARPGROUP_ENGINE> {
  static constexpr int HEAD = TILE::HEAD, OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  static constexpr int ROWS = 64;
  static constexpr int STREAMED_HALF = HEAD > 64 ? STREAMED * ROW_BYTES : 0;

  int own_offset;  // of this warpgroup's rows in the own tile

  OISD_DEVICE explicit Engine(int thread) : own_offset(thread / (4 * WARP) * 64 * ROW_BYTES) {}

  using Held = unsigned;
  OISD_DEVICE Held hold(unsigned own) const { return own; }

  OISD_DEVICE void arrived() const { fence_for_warpgroups(); }
  // Their operands in registers are complete before the fence, not only before the product.
  template <class... C>
  OISD_DEVICE void begin(C&... c) const {
    (settle(c), ...);
    warpgroup_begin();
  }
  template <class... C>
  OISD_DEVICE void end(C&... c) const {
    warpgroup_end();
    (settle(c), ...);
  }

  OISD_DEVICE void scores(float (&c)[STREAMED / 8][4], unsigned own, unsigned streamed) const {
    unsigned from = own + own_offset;
    keep_in_place(from);  // or descriptors of the own tile would fill registers throughout the loop
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {
      const unsigned in_half = pair_swizzle(k);
      warpgroup_scores(ELEMENT{}, c, describe(from + pair_offset<OWN>(k) + in_half),
                       describe(streamed + pair_offset<STREAMED>(k) + in_half));
    }
  }

  OISD_DEVICE void rows(float (&c)[HEAD / 8][4], const unsigned (&a)[STREAMED / 16][4],
                        unsigned streamed) const {
#pragma unroll
    for (int s = 0; s < STREAMED / 16; s++)
      warpgroup_rows(ELEMENT{}, c, a[s], describe(streamed + s * 16 * ROW_BYTES, STREAMED_HALF));
  }

 private:
  // The compiler may not write accumulators and left operands on the other side of this.
  template <class T, int N>
  OISD_DEVICE void settle(T (&c)[N][4]) const {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) keep_in_place(c[n][i]);
  }
};

// The same products; attention_ring.h brings the tiles.
template <class ELEMENT, class TILE>
struct Engine<ELEMENT, TILE, SPECIALIZED_ENGINE> : Engine<ELEMENT, TILE, WARPGROUP_ENGINE> {
  using Engine<ELEMENT, TILE, WARPGROUP_ENGINE>::Engine;
};
