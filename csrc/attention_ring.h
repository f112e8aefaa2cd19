// How the tiles of a specialized block come: a warp of the last warpgroup, the producer, has tensor
// maps copied into a ring of stages, the other warpgroups, the owners, multiply them.
//
// A stage has two barriers. `full`: an arrival of the producer, the copies' bytes and, where row
// values come too, the arrivals of their copies by each lane. `empty`: an arrival of each owners'
// warp, after its products of the stage are complete. Beside its tiles a stage
// has what the producer knows of them, its note, so that owners follow the producer's list of tiles
// and have none of their own.
//
// A box cannot end where its sequence does, nor leave out rows of weight 0: what it brings of those
// may be NaN, and 0 * NaN is NaN. So the owners make such rows zero before a product sums over
// them. That costs a barrier of theirs, in tiles that have such rows alone: the last one of a
// sequence, and those that are part prompt and part response. (Copying such tiles row by row by the
// producer instead would need as many instructions, of one warp.) No product sums over own rows: of
// those only the queries of weight 0 are cleared, whose gradient must be 0.
#pragma once

#include "attention_blocks.h"

// As many as the block has: 384 threads start with 168 each.
constexpr int PRODUCER_REGISTERS = 40, OWNER_REGISTERS = 232;
static_assert(128 * PRODUCER_REGISTERS + 256 * OWNER_REGISTERS <= 384 * 168, "setmaxnreg waits");

// What the producer says of a stage.
struct Note {
  int first;         // row of the streamed tile, or below 0: there is no further one
  bool aligned;      // the teacher's tile is there
  unsigned live[2];  // a bit of each row: it has a weight, or is a key

  OISD_DEVICE bool more() const { return first >= 0; }
  OISD_DEVICE bool lives(int row) const {
    return (row < WARP ? live[0] : live[1]) >> row % WARP & 1;  // an index would need a stack
  }
};

// VALUES: the producer's lanes copy row values beside the tiles.
template <class TILE, int TENSORS, bool WITH_VALUES>
struct Ring {
  static constexpr int COUNT = TILE::stages(TENSORS), STAGE = TENSORS * TILE::STREAMED_BYTES;
  static constexpr int STREAMED = TENSORS * TILE::OWN_BYTES, VALUES = STREAMED + COUNT * STAGE;
  static constexpr int NOTES = VALUES + COUNT * TILE::VALUE_BYTES, FULL = NOTES + COUNT * 16;
  static constexpr int EMPTY = FULL + COUNT * 8, OWN_FULL = EMPTY + COUNT * 8;
  static_assert(OWN_FULL + TILE::RING_EXTRA == TILE::shared_bytes(TENSORS),
                "see attention_tiles.h");

  const unsigned own = shared_base();
  int stage = 0;
  unsigned parity = 0;  // of the phase in which the stage becomes full

  OISD_DEVICE unsigned tiles() const { return own + STREAMED + stage * STAGE; }
  OISD_DEVICE unsigned values() const { return own + VALUES + stage * TILE::VALUE_BYTES; }
  OISD_DEVICE unsigned note_at() const { return own + NOTES + stage * 16; }
  OISD_DEVICE unsigned full() const { return own + FULL + stage * 8; }
  OISD_DEVICE unsigned empty() const { return own + EMPTY + stage * 8; }
  OISD_DEVICE unsigned own_full() const { return own + OWN_FULL; }

  // By all threads of the block.
  OISD_DEVICE void create() const {
    if (thread_index() == 0) {
      for (int i = 0; i < COUNT; i++) {
        barrier_create(own + FULL + i * 8, 1 + (WITH_VALUES ? WARP : 0));
        barrier_create(own + EMPTY + i * 8, TILE::WARPS);
      }
      barrier_create(own_full(), 1);
      fence_created_barriers();
    }
    barrier();
  }

  // The producer's warp: waits until a stage is empty; hands it over with its note. The copies that
  // it was filled by were announced to `full` before.
  OISD_DEVICE void wait_empty() const {
    barrier_wait(empty(), parity ^ 1);
    // All lanes have seen this phase before one of them fills the stage: whoever still looked for it
    // when the owners have given the stage back again would take it for one that has not ended.
    warp_barrier();
  }
  OISD_DEVICE void hand_over(const Note& note) {
    if constexpr (WITH_VALUES) copy_async_arrive(full());
    if (thread_index() % WARP == 0) {
      store_shared_quad(note_at(), {{static_cast<unsigned>(note.first | int(note.aligned)), 0,
                                     note.live[0], note.live[1]}});
      barrier_arrive(full());
    }
    advance();
  }
  OISD_DEVICE void end() {
    wait_empty();
    hand_over({-BOX_ROWS, false, {0, 0}});
    copy_async_wait_all();  // a thread leaves no copies behind
  }

  // The owners: wait for a stage; give it back once all that it holds has been used.
  OISD_DEVICE Note wait_full() const {
    barrier_wait(full(), parity);
    const Quad words = load_shared_quad(note_at());
    const int first = static_cast<int>(words.word[0]);
    return {first & ~1, (first & 1) != 0, {words.word[2], words.word[3]}};
  }
  OISD_DEVICE void give_back() {
    warp_barrier();  // the other lanes are done with the row values, too
    if (thread_index() % WARP == 0) barrier_arrive(empty());
    advance();
  }

 private:
  OISD_DEVICE void advance() {
    if (++stage == COUNT) stage = 0, parity ^= 1;
  }
};

// Has ROWS rows from token `token` on copied; by one thread, which announces the bytes to `full`.
template <class TILE, int ROWS>
OISD_DEVICE void copy_boxes(unsigned to, const TensorMap& from, int head, int token,
                            unsigned full) {
#pragma unroll
  for (int half = 0; half < TILE::HEAD / 64; half++)
#pragma unroll
    for (int row = 0; row < ROWS; row += BOX_ROWS)
      copy_box(to + (half * ROWS + row) * ROW_BYTES, from, half * 64, head, token + row, full);
}

// Rows of a tile that are not `valid(row)` become zero. By all owners, who meet before products.
template <class TILE, int ROWS, class Valid>
OISD_DEVICE void clear_rows(unsigned tile, const Valid& valid) {
  constexpr int CHUNKS = TILE::HEAD / CHUNK, STEP = TILE::OWNERS / CHUNKS;
  const unsigned thread = fresh_thread_index();
  const int chunk = thread % CHUNKS, start = thread / CHUNKS;
#pragma unroll 1
  for (int row = start; row < ROWS; row += STEP)
    if (!valid(row)) store_shared_quad(tile + tile_offset<ROWS>(row, chunk), {});
}
template <class TILE>
OISD_DEVICE void meet_after_clearing() {
  fence_for_warpgroups();
  barrier_of(TILE::OWNERS);
}
