// Tile sizes of the attention kernels, read by the launcher too: TILE(name, engine, K, own,
// streamed).
//
// A block owns `own` rows, 16 a warp, and streams tiles of `streamed` rows of the other side past
// them. "wide" halves the reads of a "narrow" tile from L2, but needs an A100's or H100's shared
// memory at K = 128; "narrow" fits the 99 KB of consumer cards. Both multiply warp by warp
// (mma.sync), "hopper" by warpgroups (wgmma).
#pragma once

#include "layout.h"

enum Engines { WARP_ENGINE, WARPGROUP_ENGINE };

#define OISD_TILES(TILE)                      \
  TILE(wide, WARP_ENGINE, 64, 128, 64)        \
  TILE(wide, WARP_ENGINE, 128, 128, 32)       \
  TILE(narrow, WARP_ENGINE, 128, 64, 32)      \
  TILE(hopper, WARPGROUP_ENGINE, 64, 128, 64) \
  TILE(hopper, WARPGROUP_ENGINE, 128, 128, 64)

constexpr int STAGES = 2;      // streamed tiles in shared memory, one of them in flight
constexpr int ROW_VALUES = 4;  // floats kept beside each streamed query
// Bytes a block may have on sm_80, on sm_86, sm_89 and sm_120, and on sm_90.
constexpr int SHARED_WIDE = 163 * 1024, SHARED_NARROW = 99 * 1024, SHARED_HOPPER = 227 * 1024;

template <Engines ENGINE_, int HEAD_, int OWN_, int STREAMED_>
struct Tile {
  static constexpr Engines ENGINE = ENGINE_;
  static constexpr int HEAD = HEAD_, OWN = OWN_, STREAMED = STREAMED_;
  static constexpr int WARPS = OWN / 16, THREADS = WARPS * WARP;
  static constexpr int OWN_BYTES = OWN * HEAD * 2, STREAMED_BYTES = STREAMED * HEAD * 2;

  // `tensors`: 2 (student's q and k, or those and the teacher's) or 3.
  static constexpr int shared_bytes(int tensors) {
    return tensors * (OWN_BYTES + STAGES * STREAMED_BYTES) + STAGES * ROW_VALUES * STREAMED * 4;
  }

  static_assert(HEAD == 64 || HEAD == 128, "a tile is one or two halves of 64 columns");
  static_assert(OWN % 16 == 0 && STREAMED % 16 == 0, "an mma is 16 rows by 16 deep");
  static_assert(STREAMED <= 64, "one warp reads the weights of a streamed tile in two steps");
  static_assert(OWN * (HEAD / CHUNK) % THREADS == 0, "every thread copies as many chunks");
  static_assert(STREAMED * (HEAD / CHUNK) % THREADS == 0, "every thread copies as many chunks");
  static_assert(ROW_VALUES * STREAMED <= THREADS, "every thread copies at most one row value");
  static_assert(WARPS <= 8, "the accumulators take up to 255 registers a thread");
  static_assert(ENGINE == WARP_ENGINE || OWN % 64 == 0, "a wgmma is 64 rows");
  static_assert(OWN % 8 == 0 && STREAMED % 8 == 0, "tiles begin at 1024 bytes, a swizzle's period");
};

#define OISD_CHECK_TILE(name, engine, head, own, streamed)                                  \
  struct name##_##head : Tile<engine, head, own, streamed> {                                \
    static_assert(shared_bytes(3) <= (engine == WARP_ENGINE ? SHARED_WIDE : SHARED_HOPPER), \
                  "too much shared memory");                                                \
  };
OISD_TILES(OISD_CHECK_TILE)
#undef OISD_CHECK_TILE

static_assert(narrow_128::shared_bytes(3) <= SHARED_NARROW, "must fit a consumer card");
static_assert(wide_64::shared_bytes(3) <= SHARED_NARROW, "must fit a consumer card");
