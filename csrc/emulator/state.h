// The state of the block that runs: its threads, its shared memory, and its pending copies.
// Single-threaded.
#pragma once

#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <ucontext.h>
#include <vector>

#include "../layout.h"
#include "emulate_order.h"

namespace emulator {

enum Collective { MATRICES, MATRICES_TRANSPOSED, MULTIPLY, SHUFFLE, VOTE, MEET, PRODUCTS };
constexpr int GROUP = 4 * WARP, NAMED_BARRIERS = 16, MOST_BARRIERS = 32;

struct Copy {
  unsigned to, bytes;
  const void* from;  // null: zeros
};

// A wgmma that was issued: a in registers, or left and right in shared memory.
struct Product {
  bool half, from_registers;
  unsigned in[4];
  unsigned long long left, right;  // matrix descriptors
  float (*sums)[4];
  int width;  // columns of the sums
};

struct Lane {
  ucontext_t context;
  jmp_buf jump;
  std::vector<char> stack;
  bool started, done, waiting;
  int barrier, barrier_threads;  // the barrier it waits at, or -1
  bool awaits;                   // whether it waits for a phase of a barrier in shared memory,
  unsigned awaited, parity;      // which one and which parity
  bool late;  // looks at that barrier only when no other thread can run
  Collective operation;
  unsigned in[4], address, b[2];
  float c[4];
  int lanes;
  unsigned votes;
  bool flag, half;
  bool open;  // since wgmma.fence
  int registers;
  std::vector<Product> products;
  std::vector<Copy> copies;
  std::vector<unsigned> unfenced;  // cells
};

// Copies that a barrier counts: those of one thread, with what it knew when it issued them, or the
// box of a tensor map (`map` is then not null).
struct PendingCopy {
  int thread;
  unsigned barrier;
  std::vector<Copy> copies;
  int epoch;
  Clock known;
  const void* map;
  unsigned to;
  int at[3];
};

inline std::vector<unsigned char> memory;
inline std::vector<Lane> lanes;  // one for each thread of the block
inline int current, block;
inline bool reverse, shuffled;
inline unsigned seed;
inline std::vector<PendingCopy> pending;
inline jmp_buf scheduler, launcher;
inline void (*body)(const void*);
inline const void* parameters;
inline std::string failure;

// Ends the block. Called by a thread or, where `current` is below 0, by the scheduler.
[[noreturn, gnu::noinline]] inline void fail(const char* format, ...) {
  if (failure.empty()) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 900) std::snprintf(text + length, 100, " (block %d, thread %d)", block, current);
    failure = text;
  }
  longjmp(current < 0 ? launcher : scheduler, 1);
}

inline Lane& me() { return lanes[current]; }

// Random, from 0 to n - 1.
inline unsigned random_below(size_t n) {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) % unsigned(n);
}

inline unsigned char* shared(unsigned address, unsigned bytes) {
  if (address % bytes) fail("misaligned shared address %u", address);
  if (size_t(address) + bytes > memory.size()) fail("shared address %u out of bounds", address);
  return memory.data() + address;
}

[[gnu::noinline]] inline unsigned char* read_shared(int thread, unsigned address, unsigned bytes) {
  unsigned char* data = shared(address, bytes);
  check_read(thread, address, bytes, false);
  return data;
}
[[gnu::noinline]] inline void write_shared(int thread, unsigned address, const void* from,
                                           unsigned bytes) {
  unsigned char* to = shared(address, bytes);
  check_write(thread, address, bytes, false);
  set_writer(address, bytes, {thread, clocks[thread][thread], true});
  for (unsigned i = 0; i < bytes; i += CELL) lanes[thread].unfenced.push_back((address + i) / CELL);
  from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
}

inline void suspend() {
  if (!_setjmp(me().jump)) longjmp(scheduler, 1);
}

}  // namespace emulator
