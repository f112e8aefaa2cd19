// The products of a warp's 16 rows with a tile, by ldmatrix and mma.sync.
#pragma once

#include "attention_tiles.h"
#include "primitives.h"

template <class ELEMENT, class TILE, Engines = TILE::ENGINE>
struct Engine;

// Accumulators [16, STREAMED] are left operands once they are rounded: the lanes agree.
template <class ELEMENT, int STREAMED>
OISD_DEVICE void round_to_left(unsigned (&left)[STREAMED / 16][4],
                               const float (&c)[STREAMED / 8][4]) {
#pragma unroll
  for (int s = 0; s < STREAMED / 16; s++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* from = &c[2 * s + i / 2][2 * (i % 2)];
      left[s][i] = pack(ELEMENT{}, from[0], from[1]);
    }
}

template <class ELEMENT, class TILE>
struct Engine<ELEMENT, TILE, WARP_ENGINE> {
  static constexpr int HEAD = TILE::HEAD, OWN = TILE::OWN, STREAMED = TILE::STREAMED;
  static constexpr int ROWS = 16;  // that one instruction multiplies

  // Offsets into a tile that this lane hands to ldmatrix, of chunks 0 and 1.
  int left, right, transposed;

  OISD_DEVICE explicit Engine(int thread)
      : left(tile_offset<OWN>(thread / WARP * 16 + left_row(thread % WARP),
                              left_chunk(thread % WARP))),
        right(tile_offset<STREAMED>(right_row(thread % WARP), right_chunk(thread % WARP))),
        transposed(tile_offset<STREAMED>(transposed_row(thread % WARP),
                                         transposed_chunk(thread % WARP))) {}

  // The own rows as left operands, all of K, in registers.
  struct Held {
    unsigned left[HEAD / 16][4];
  };
  OISD_DEVICE Held hold(unsigned own) const {
    Held held;
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) load_own(held.left[k], own, k);
    return held;
  }

  OISD_DEVICE void arrived() const {}  // copies that this thread has waited for
  template <class... C>
  OISD_DEVICE void begin(C&...) const {}  // products of these registers follow
  template <class... C>
  OISD_DEVICE void end(C&...) const {}  // they are in the accumulators

  // c [16, STREAMED] += own [16, K] streamed [STREAMED, K]^T
  OISD_DEVICE void scores(float (&c)[STREAMED / 8][4], const Held& held, unsigned streamed) const {
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) multiply(c, held.left[k], streamed, k);
  }
  OISD_DEVICE void scores(float (&c)[STREAMED / 8][4], unsigned own, unsigned streamed) const {
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {
      unsigned a[4];
      load_own(a, own, k);
      multiply(c, a, streamed, k);
    }
  }

  // c [16, K] += left [16, STREAMED] streamed [STREAMED, K]
  OISD_DEVICE void rows(float (&c)[HEAD / 8][4], const unsigned (&a)[STREAMED / 16][4],
                        unsigned streamed) const {
#pragma unroll
    for (int s = 0; s < STREAMED / 16; s++)
#pragma unroll
      for (int n = 0; n < HEAD / 16; n++) {
        unsigned b[4];
        load_matrices_transposed(b, ((streamed + transposed) ^ pair_swizzle(n)) +
                                        pair_offset<STREAMED>(n) + s * 16 * ROW_BYTES);
        multiply_add(ELEMENT{}, c[2 * n], a[s], b[0], b[1]);
        multiply_add(ELEMENT{}, c[2 * n + 1], a[s], b[2], b[3]);
      }
  }

 private:
  OISD_DEVICE void load_own(unsigned (&a)[4], unsigned own, int k) const {
    load_matrices(a, ((own + left) ^ pair_swizzle(k)) + pair_offset<OWN>(k));
  }
  OISD_DEVICE void multiply(float (&c)[STREAMED / 8][4], const unsigned (&a)[4], unsigned streamed,
                            int k) const {
#pragma unroll
    for (int n = 0; n < STREAMED / 16; n++) {
      unsigned b[4];
      load_matrices(b, ((streamed + right) ^ pair_swizzle(k)) + pair_offset<STREAMED>(k) +
                           n * 16 * ROW_BYTES);
      multiply_add(ELEMENT{}, c[2 * n], a, b[0], b[1]);
      multiply_add(ELEMENT{}, c[2 * n + 1], a, b[2], b[3]);
    }
  }
};
