// The instructions of primitives.h on a CPU, for tests: the kernels' own source runs block by
// block, each thread a fibre.
//
// The lanes of a warp meet at every collective instruction, and must meet at the same one. Shared
// memory starts as NaN, and every access to it is checked for bounds, alignment and order:
// emulate_order.h says what a thread may see. An asynchronous copy completes when its thread waits
// for it or, if a barrier counts it, when no thread can run. Two more orders find more mistakes:
//   reverse   warps and blocks run in reverse order, and copies complete at once. When a warp waits
//             for a barrier in shared memory, all its lanes but the first notice as late as possible.
//   shuffled  all of this is random.
// In a deadlock the error says what each warp waits for.
#pragma once

#include "schedule.h"

#define OISD_DEVICE inline
#define OISD_KERNEL(threads, blocks) void

inline int thread_index() { return emulator::current; }
inline int block_index() { return emulator::block; }
inline unsigned shared_base() { return 0; }

[[gnu::noinline]] inline void emulated_copy(unsigned to, unsigned bytes, const void* from) {
  using namespace emulator;
  shared(to, bytes);
  check_write(current, to, bytes, false);
  set_writer(to, bytes, {current, IN_FLIGHT, true});
  me().copies.push_back({to, bytes, from});
}
inline void copy_async_16(unsigned to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("misaligned source of a copy");
  emulated_copy(to, 16, valid ? from : nullptr);
}
inline void copy_async_4(unsigned to, const void* from, bool valid) {
  emulated_copy(to, 4, valid ? from : nullptr);
}
[[gnu::noinline]] inline void copy_async_wait_all() {
  using namespace emulator;
  for (size_t i = 0; i < pending.size();)  // includes this thread's copies that a barrier counts
    if (pending[i].thread == current) {
      const PendingCopy copy = pending[i];
      pending.erase(pending.begin() + i);
      complete(copy);
    } else {
      i++;
    }
  const std::vector<Copy> copies = std::move(me().copies);
  me().copies.clear();
  for (const Copy& copy : copies) {
    set_writer(copy.to, copy.bytes, Cell());
    write_shared(current, copy.to, copy.from, copy.bytes);
  }
}
inline void barrier() {
  emulator::me().barrier = 0, emulator::me().barrier_threads = int(emulator::lanes.size());
  emulator::suspend();
}
inline void warp_barrier() { emulator::meet(emulator::MEET); }

inline void load_matrices(unsigned (&r)[4], unsigned address) {
  emulator::me().address = address;
  emulator::meet(emulator::MATRICES);
  std::memcpy(r, emulator::me().in, 16);
}
inline void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  emulator::me().address = address;
  emulator::meet(emulator::MATRICES_TRANSPOSED);
  std::memcpy(r, emulator::me().in, 16);
}

[[gnu::noinline]] inline void emulated_multiply(bool half, float (&c)[4], const unsigned (&a)[4],
                                                unsigned b0, unsigned b1) {
  emulator::Lane& lane = emulator::me();
  lane.half = half, lane.b[0] = b0, lane.b[1] = b1;
  std::memcpy(lane.in, a, 16), std::memcpy(lane.c, c, 16);
  emulator::meet(emulator::MULTIPLY);
  std::memcpy(c, emulator::me().c, 16);
}
inline void multiply_add(Bfloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                         unsigned b1) {
  emulated_multiply(false, c, a, b0, b1);
}
inline void multiply_add(Float16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated_multiply(true, c, a, b0, b1);
}

inline unsigned pack(Bfloat16, float low, float high) {
  return emulator::round_bfloat16(low) | emulator::round_bfloat16(high) << 16;
}
inline unsigned pack(Float16, float low, float high) {
  return emulator::round_float16(low) | emulator::round_float16(high) << 16;
}
inline Pair unpack(Bfloat16, unsigned r) {
  return {emulator::part(false, r, 0), emulator::part(false, r, 1)};
}
inline Pair unpack(Float16, unsigned r) {
  return {emulator::part(true, r, 0), emulator::part(true, r, 1)};
}

inline float exp2_of(float x) { return emulator::approximate_exp2(x); }
inline float log2_of(float x) { return emulator::approximate_log2(x); }

[[gnu::noinline]] inline Pair load_shared_pair(unsigned address) {
  Pair p;
  std::memcpy(&p, emulator::read_shared(emulator::current, address, 8), 8);
  return p;
}
inline Quad load_shared_quad(unsigned address) {
  Quad q;
  std::memcpy(&q, emulator::read_shared(emulator::current, address, 16), 16);
  return q;
}
inline void store_shared_quad(unsigned address, const Quad& q) {
  emulator::write_shared(emulator::current, address, &q, 16);
}
inline int uniform(int x) { return x; }
inline float shuffle_xor(float x, int lanes) {
  emulator::me().c[0] = x, emulator::me().lanes = lanes;
  emulator::meet(emulator::SHUFFLE);
  return emulator::me().c[0];
}
inline unsigned votes_of_warp(bool x) {
  emulator::me().flag = x;
  emulator::meet(emulator::VOTE);
  return emulator::me().votes;
}
inline bool any_of_warp(bool x) { return votes_of_warp(x) != 0; }

inline void keep_in_place(float&) {}
inline void keep_in_place(unsigned&) {}
