// Tile sizes of the attention kernels, read by the launcher too: TILE(name, engine, K, own,
// streamed).
//
// A block owns `own` rows, 16 a warp, and streams tiles of `streamed` rows of the other side past
// them. "wide" halves the reads of a "narrow" tile from L2, but needs an A100's or H100's shared
// memory at K = 128; "narrow" fits the 99 KB of consumer cards. Both multiply warp by warp
// (mma.sync), "hopper" by warpgroups (wgmma). Their threads copy, too; in a "specialized" block a
// warpgroup more does, by tensor maps into a ring of stages, and those that own rows only multiply.
#pragma once

#include "layout.h"

enum Engines { WARP_ENGINE, WARPGROUP_ENGINE, SPECIALIZED_ENGINE };

#define OISD_TILES(TILE)                             \
  TILE(wide, WARP_ENGINE, 64, 128, 64)               \
  TILE(wide, WARP_ENGINE, 128, 128, 32)              \
  TILE(narrow, WARP_ENGINE, 128, 64, 32)             \
  TILE(hopper, WARPGROUP_ENGINE, 64, 128, 64)        \
  TILE(hopper, WARPGROUP_ENGINE, 128, 128, 64)       \
  TILE(specialized, SPECIALIZED_ENGINE, 64, 128, 64) \
  TILE(specialized, SPECIALIZED_ENGINE, 128, 128, 64)

constexpr int STAGES = 2;      // streamed tiles in shared memory, one of them in flight
constexpr int MOST_STAGES = 4;  // of a specialized block, which has as many as fit
constexpr int ROW_VALUES = 4;  // floats kept beside each streamed query
constexpr int WARPGROUP = 4 * WARP;
constexpr int BOX_ROWS = 64;  // of a tensor map, as wide as the swizzle: 64 columns
// Bytes a block may have on sm_80, on sm_86, sm_89 and sm_120, and on sm_90.
constexpr int SHARED_WIDE = 163 * 1024, SHARED_NARROW = 99 * 1024, SHARED_HOPPER = 227 * 1024;

template <Engines ENGINE_, int HEAD_, int OWN_, int STREAMED_>
struct Tile {
  static constexpr Engines ENGINE = ENGINE_;
  static constexpr int HEAD = HEAD_, OWN = OWN_, STREAMED = STREAMED_;
  static constexpr bool SPECIALIZED = ENGINE == SPECIALIZED_ENGINE;
  static constexpr int WARPS = OWN / 16, OWNERS = WARPS * WARP;  // threads that own rows
  static constexpr int THREADS = OWNERS + SPECIALIZED * WARPGROUP;
  static constexpr int OWN_BYTES = OWN * HEAD * 2, STREAMED_BYTES = STREAMED * HEAD * 2;
  static constexpr int VALUE_BYTES = ROW_VALUES * STREAMED * 4;
  // Beside a stage of a ring: its note and its two barriers; and once, the own tile's barrier.
  static constexpr int STAGE_EXTRA = 16 + 2 * 8, RING_EXTRA = 16;

  // `tensors`: 2 (student's q and k, or those and the teacher's) or 3.
  static constexpr int stages(int tensors) {
    if (!SPECIALIZED) return STAGES;
    const int stage = tensors * STREAMED_BYTES + VALUE_BYTES + STAGE_EXTRA;
    const int fit = (SHARED_HOPPER - tensors * OWN_BYTES - RING_EXTRA) / stage;
    return fit < MOST_STAGES ? fit : MOST_STAGES;
  }
  static constexpr int shared_bytes(int tensors) {
    const int stage = tensors * STREAMED_BYTES + VALUE_BYTES + SPECIALIZED * STAGE_EXTRA;
    return tensors * OWN_BYTES + stages(tensors) * stage + SPECIALIZED * RING_EXTRA;
  }

  static_assert(HEAD == 64 || HEAD == 128, "a tile is one or two halves of 64 columns");
  static_assert(OWN % 16 == 0 && STREAMED % 16 == 0, "an mma is 16 rows by 16 deep");
  static_assert(STREAMED <= 64, "one warp reads the weights of a streamed tile in two steps");
  static_assert(OWN * (HEAD / CHUNK) % OWNERS == 0, "every thread copies as many chunks");
  static_assert(STREAMED * (HEAD / CHUNK) % OWNERS == 0, "every thread copies as many chunks");
  static_assert(ROW_VALUES * STREAMED <= OWNERS, "every thread copies at most one row value");
  static_assert(WARPS <= 8, "the accumulators take up to 255 registers a thread");
  static_assert(ENGINE == WARP_ENGINE || OWN % 64 == 0, "a wgmma is 64 rows");
  static_assert(!SPECIALIZED || (STREAMED == BOX_ROWS && OWN % BOX_ROWS == 0), "tiles are boxes");
  static_assert(OWN % 8 == 0 && STREAMED % 8 == 0, "tiles begin at 1024 bytes, a swizzle's period");
};

#define OISD_CHECK_TILE(name, engine, head, own, streamed)                                  \
  struct name##_##head : Tile<engine, head, own, streamed> {                                \
    static_assert(shared_bytes(3) <= (engine == WARP_ENGINE ? SHARED_WIDE : SHARED_HOPPER), \
                  "too much shared memory");                                                \
    static_assert(stages(3) >= 2, "one stage is filled while another is read");             \
  };
OISD_TILES(OISD_CHECK_TILE)
#undef OISD_CHECK_TILE

static_assert(narrow_128::shared_bytes(3) <= SHARED_NARROW, "must fit a consumer card");
static_assert(wide_64::shared_bytes(3) <= SHARED_NARROW, "must fit a consumer card");
