// The instructions of primitives_sm90.h on a CPU.
#pragma once

#include "schedule.h"

inline void fence_for_warpgroups() {
  using namespace emulator;
  for (unsigned cell : me().unfenced)
    if (cells[cell].writer == current)
      cells[cell].generic = false, cells[cell].epoch = clocks[current][current];
  me().unfenced.clear();
}
inline void warpgroup_begin() { emulator::me().open = true; }
inline void warpgroup_end() {
  emulator::meet(emulator::PRODUCTS);
  emulator::me().open = false;
}

inline bool is_half(Bfloat16) { return false; }
inline bool is_half(Float16) { return true; }
template <class ELEMENT, int N>
inline void warpgroup_scores(ELEMENT element, float (&c)[N][4], unsigned long long a,
                             unsigned long long b) {
  emulator::issue({is_half(element), false, {}, a, b, nullptr, 0}, c);
}
template <class ELEMENT, int N>
inline void warpgroup_rows(ELEMENT element, float (&c)[N][4], const unsigned (&a)[4],
                           unsigned long long b) {
  emulator::issue({is_half(element), true, {a[0], a[1], a[2], a[3]}, 0, b, nullptr, 0}, c);
}

[[gnu::noinline]] inline void barrier_create(unsigned address, int arrivals) {
  using namespace emulator;
  shared(address, 8);
  if (barriers.size() == MOST_BARRIERS) fail("too many barriers for the emulation");
  // A later access to a tile that overlaps it would see an unknown writer.
  set_writer(address, 8, {current, IN_FLIGHT, true});
  barriers.push_back({address, arrivals, arrivals, 0, 0, current, false, none(), none()});
}
inline void fence_created_barriers() {
  for (emulator::Barrier& barrier : emulator::barriers)
    if (barrier.creator == emulator::current) barrier.fenced = true;
}
[[gnu::noinline]] inline void barrier_arrive(unsigned barrier) {
  using namespace emulator;
  Barrier& at = barrier_at(barrier);
  publish(current, at.arriving);
  arrive(at);
}
[[gnu::noinline]] inline void barrier_expect(unsigned barrier, int bytes) {
  emulator::Barrier& at = emulator::barrier_at(barrier);
  if (!at.missing) emulator::fail("announces bytes to a phase that all have arrived at");
  at.bytes += bytes;
}
[[gnu::noinline]] inline void barrier_wait(unsigned barrier, unsigned parity) {
  using namespace emulator;
  barrier_at(barrier);
  if (shuffled ? random_below(2) : reverse && current % WARP) me().late = true, suspend();
  while (!phase_ended(barrier, parity)) {
    me().awaits = true, me().awaited = barrier, me().parity = parity;
    suspend();
  }
  me().awaits = false;
  learn(clocks[current], barrier_at(barrier).ended);
}
inline void barrier_of(int threads) {
  emulator::me().barrier = 1, emulator::me().barrier_threads = threads;
  emulator::suspend();
}
[[gnu::noinline]] inline void copy_async_arrive(unsigned barrier) {
  using namespace emulator;
  const int thread = current;
  PendingCopy copy = {thread, barrier, me().copies, clocks[thread][thread], none(), nullptr, 0, {}};
  me().copies.clear();
  publish(thread, copy.known);
  enqueue(copy);
}

[[gnu::noinline]] inline void copy_box(unsigned to, const TensorMap& map, int column, int head,
                                       int row, unsigned barrier) {
  using namespace emulator;
  Map box;
  std::memcpy(&box, &map, sizeof box);
  if (!box.address || box.swizzle != 128 || box.box[0] * 2 > 128) fail("not a tensor map");
  const unsigned bytes = 2 * box.box[0] * box.box[1] * box.box[2];
  if (to % 1024) fail("a box goes to a multiple of 1024 bytes, the swizzle's period");
  if (size_t(to) + bytes > memory.size()) fail("a box out of bounds");
  Barrier& counts = barrier_at(barrier);
  if (!counts.fenced) fail("a copy by a barrier whose creation was not fenced");
  boxes++;
  check_write(current, to, bytes, true);
  set_writer(to, bytes, {clock_of(counts), IN_FLIGHT, false});
  enqueue({current, barrier, {}, 0, {}, &map, to, {column, head, row}});
}

template <int COUNT>
inline void fewer_registers() {
  emulator::set_registers(COUNT, false);
}
template <int COUNT>
inline void more_registers() {
  emulator::set_registers(COUNT, true);
}
