// What a thread may see in the emulated shared memory: each access is checked against the order that
// barriers establish, so that a missing barrier is an error in whatever order threads ran.
//
// Every thread, and every barrier on behalf of the copies it counts, keeps a vector clock of all
// the others. A thread knows a write once a barrier has ordered it after that write. A read must know
// the last write, and a write must know all earlier reads.
#pragma once

#include <climits>
#include <vector>

namespace emulator {

using Clock = std::vector<int>;
constexpr int CELL = 4, LINE = 16;  // bytes: writes are kept by cells, reads by lines
constexpr int IN_FLIGHT = INT_MAX;  // the epoch of bytes whose copy is not complete

struct Cell {
  int writer = -1, epoch = 0;
  bool generic = false;  // written by a thread and not fenced: wgmma may miss it
};

inline std::vector<Cell> cells;
inline std::vector<unsigned short> reads;  // [lines, threads]: epoch of a thread's last read
inline std::vector<Clock> clocks;
inline int readers;  // threads

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline void forget_order(int threads, int others, size_t bytes) {
  readers = threads;
  cells.assign(bytes / CELL + 1, Cell());
  reads.assign((bytes / LINE + 1) * threads, 0);
  clocks.assign(threads + others, Clock(threads + others, 0));
  for (int i = 0; i < threads; i++) clocks[i][i] = 1;
}

// The two that loop over all threads are compiled for speed.
__attribute__((optimize("O3"))) inline void learn(Clock& clock, const Clock& from) {
  int *to = clock.data(), size = int(clock.size());
  const int* other = from.data();
  for (int i = 0; i < size; i++) to[i] = to[i] < other[i] ? other[i] : to[i];
}
__attribute__((optimize("O3"))) inline bool any_later(const unsigned short* read, const int* known,
                                                      int threads) {
  int any = 0;
  for (int i = 0; i < threads; i++) any |= read[i] > known[i];
  return any;
}
inline Clock none() { return Clock(clocks.size(), 0); }
// What `thread` did so far, for the threads that learn it.
inline void publish(int thread, Clock& to) {
  learn(to, clocks[thread]);
  if (++clocks[thread][thread] > USHRT_MAX) fail("too many barriers for the emulation");
}

inline bool knows(int thread, const Cell& cell) {
  return cell.writer < 0 || clocks[thread][cell.writer] >= cell.epoch;
}

// `by_wgmma` (or a tensor map's copy): not through the thread's own view of memory.
[[gnu::noinline]] inline void check_read(int thread, unsigned address, unsigned bytes,
                                         bool by_wgmma) {
  for (unsigned i = address / CELL; i < (address + bytes + CELL - 1) / CELL; i++) {
    const Cell& cell = cells[i];
    if (!knows(thread, cell))
      fail("reads shared memory at %u before %s %d hands it over", i * CELL,
           cell.writer < readers ? "thread" : "the copy of barrier",
           cell.writer < readers ? cell.writer : cell.writer - readers);
    if (by_wgmma && cell.generic)
      fail("wgmma reads what thread %d wrote without a fence", cell.writer);
  }
  for (unsigned i = address / LINE; i <= (address + bytes - 1) / LINE; i++)
    reads[i * readers + thread] = clocks[thread][thread];
}

[[gnu::noinline]] inline void check_write(int thread, unsigned address, unsigned bytes,
                                          bool by_map) {
  for (unsigned i = address / CELL; i < (address + bytes + CELL - 1) / CELL; i++) {
    const Cell& cell = cells[i];
    if (!knows(thread, cell))
      fail("overwrites shared memory at %u that %s %d has not handed over", i * CELL,
           cell.writer < readers ? "thread" : "the copy of barrier",
           cell.writer < readers ? cell.writer : cell.writer - readers);
    if (by_map && cell.generic) fail("a copy may overtake what thread %d wrote", cell.writer);
  }
  const int* known = clocks[thread].data();
  for (unsigned i = address / LINE; i <= (address + bytes - 1) / LINE; i++) {
    const unsigned short* read = &reads[i * readers];
    if (!any_later(read, known, readers)) continue;
    int other = 0;
    while (read[other] <= known[other]) other++;
    fail("overwrites shared memory at %u that thread %d may still read", i * LINE, other);
  }
}

inline void set_writer(unsigned address, unsigned bytes, const Cell& cell) {
  for (unsigned i = address / CELL; i < (address + bytes + CELL - 1) / CELL; i++) cells[i] = cell;
}

}  // namespace emulator
