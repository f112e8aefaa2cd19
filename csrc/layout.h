// Where an element lies: the swizzle of tiles in shared memory, and the lanes of mma.sync.
//
// A tile is [ROWS, K] in 16-bit elements, stored as one or two halves of 64 columns, whose rows are
// eight chunks of 16 bytes. Chunk c of row r is stored as chunk c ^ (r % 8), so that the eight rows
// that an ldmatrix phase reads at one c lie in different banks; it is also the 128-byte swizzle of
// wgmma.
#pragma once

#if defined(__CUDACC__)
#define OISD_LAYOUT __host__ __device__ constexpr __forceinline__
#else
#define OISD_LAYOUT constexpr inline
#endif

constexpr int WARP = 32;
constexpr int CHUNK = 8;  // elements of 16 bytes

constexpr int ROW_BYTES = 128;

// Byte offset of a chunk in a tile.
template <int ROWS>
OISD_LAYOUT int tile_offset(int row, int chunk) {
  return (chunk / 8 * ROWS + row) * ROW_BYTES + ((chunk % 8) ^ (row & 7)) * 16;
}

// From chunk 0 or 1 of a row to the same one of pair `pair`: added to what an exclusive or with
// pair_swizzle gives.
OISD_LAYOUT int pair_swizzle(int pair) { return pair % 4 * 32; }
template <int ROWS>
OISD_LAYOUT int pair_offset(int pair) {
  return pair / 4 * ROWS * ROW_BYTES;
}

// m16n8k16: accumulator c[i] of a lane is row accumulator_row + 8 * (i / 2), column
// accumulator_column + i % 2 of the 16 x 8 tile.
OISD_LAYOUT int accumulator_row(int lane) { return lane >> 2; }
OISD_LAYOUT int accumulator_column(int lane) { return (lane & 3) * 2; }

// Halves 2 * r and 2 * r + 1 of register r: element i of the left operand [16 rows, 16 deep] and of
// the right one [16 deep, 8 columns].
OISD_LAYOUT int left_element_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1 & 1); }
OISD_LAYOUT int left_element_depth(int lane, int i) {
  return (lane & 3) * 2 + (i & 1) + 8 * (i >> 2);
}
OISD_LAYOUT int right_element_depth(int lane, int i) {
  return (lane & 3) * 2 + (i & 1) + 8 * (i >> 1);
}
OISD_LAYOUT int right_element_column(int lane) { return lane >> 2; }

// The row and the chunk whose address a lane hands to ldmatrix.x4 for
//   the left operand, 16 rows by 16 deep, stored [row, depth];
OISD_LAYOUT int left_row(int lane) { return lane & 15; }
OISD_LAYOUT int left_chunk(int lane) { return lane >> 4; }
//   two right operands, 16 columns by 16 deep, stored [column, depth];
OISD_LAYOUT int right_row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
OISD_LAYOUT int right_chunk(int lane) { return (lane >> 3) & 1; }
//   two right operands, 16 deep by 16 columns, stored [depth, column], read with .trans.
OISD_LAYOUT int transposed_row(int lane) { return lane & 15; }
OISD_LAYOUT int transposed_chunk(int lane) { return lane >> 4; }
// The registers are then {0, 1} for columns 0 to 7 and {2, 3} for columns 8 to 15.
