// The primitives of a GPU on a CPU: the kernels' own source runs block by block, each thread a
// fibre.
//
// A warp's lanes meet at every collective instruction, and must meet at the same one. Shared memory
// starts as NaN; every access to it is checked for bounds, alignment, and order: emulate_order.h
// says what a thread may see. An asynchronous copy arrives when its thread waits for it, or, if a
// barrier counts it (emulate_sm90.h), when nothing else can go on; `reverse`: at once, with warps
// and blocks in the reverse order, and of a warp that waits for a barrier in shared memory all lanes
// but the first notice its phase as late as can be; `shuffled`: all of this by chance. Where nothing
// can go on at all, the message says who waits for what. Single-threaded; for tests.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cstdarg>
#include <string>
#include <ucontext.h>
#include <vector>

#include "emulate_order.h"
#include "emulate_rounding.h"

#define OISD_DEVICE inline
#define OISD_KERNEL(threads, blocks) void

namespace emulator {

enum Collective { NONE, MATRICES, MATRICES_TRANSPOSED, MULTIPLY, SHUFFLE, VOTE, MEET, PRODUCTS };
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
  int barrier, barrier_threads;  // that it waits at, or -1
  bool awaits;                   // the end of a phase of a barrier in shared memory:
  unsigned awaited, parity;
  bool late;  // looks at that barrier only when nothing else can go on
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

// Copies that arrive by themselves, and the barrier that counts them: of one thread, with what it
// knew, or the box of a tensor map.
struct Flight {
  int thread;
  unsigned barrier;
  std::vector<Copy> copies;
  int epoch;
  Clock known;
  const void* map;
  unsigned to;
  int at[3];
};
void land(const Flight& flight);

inline std::vector<unsigned char> memory;
inline std::vector<Lane> lanes;
inline int current, block;
inline bool reverse, shuffled;
inline unsigned seed;  // of what is left to chance
inline std::vector<Flight> flights;
inline jmp_buf scheduler, launcher;
inline ucontext_t starter;
inline void (*body)(const void*);
inline const void* parameters;
inline std::string failure;

// Ends the block; from a thread or, where `current` is below 0, from the scheduler.
[[noreturn, gnu::noinline]] inline void fail(const char* format, ...) {
  if (failure.empty()) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 900)
      std::snprintf(text + length, 100, " (block %d, thread %d)", block, current);
    failure = text;
  }
  longjmp(current < 0 ? launcher : scheduler, 1);
}

inline Lane& me() { return lanes[current]; }

// From 0 to n - 1, by chance.
inline unsigned roll(size_t n) {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) % unsigned(n);
}

inline unsigned char* shared(unsigned address, unsigned bytes) {
  if (address % bytes) fail("misaligned shared address %u", address);
  if (size_t(address) + bytes > memory.size())
    fail("shared address %u out of bounds", address);
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

// All lanes of the warp that begins at `first` have posted their operands.
[[gnu::noinline]] inline void execute(int first) {
  Lane* warp = &lanes[first];
  const Collective operation = warp[0].operation;
  if (operation == MATRICES || operation == MATRICES_TRANSPOSED) {
    unsigned out[WARP][4];
    const unsigned char* rows[4][8];
    for (int lane = 0; lane < WARP; lane++)
      rows[lane / 8][lane % 8] = read_shared(first + lane, warp[lane].address, 16);
    for (int lane = 0; lane < WARP; lane++)
      for (int i = 0; i < 4; i++) {
        auto at = [&](int row, int column) {
          uint16_t x;
          std::memcpy(&x, rows[i][row] + 2 * column, 2);
          return unsigned(x);
        };
        const int r = lane / 4, c = 2 * (lane % 4);
        out[lane][i] =
            operation == MATRICES ? at(r, c) | at(r, c + 1) << 16 : at(c, r) | at(c + 1, r) << 16;
      }
    for (int lane = 0; lane < WARP; lane++) std::memcpy(warp[lane].in, out[lane], 16);
  } else if (operation == MULTIPLY) {
    const bool half = warp[0].half;
    static float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; lane++) {
      for (int i = 0; i < 8; i++)
        a[left_element_row(lane, i)][left_element_depth(lane, i)] =
            part(half, warp[lane].in[i / 2], i % 2);
      for (int i = 0; i < 4; i++)
        b[right_element_depth(lane, i)][right_element_column(lane)] =
            part(half, warp[lane].b[i / 2], i % 2);
    }
    for (int lane = 0; lane < WARP; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = accumulator_row(lane) + 8 * (i / 2),
                  column = accumulator_column(lane) + i % 2;
        for (int k = 0; k < 16; k += 8) {
          Sum<8> sum(warp[lane].c[i]);
          for (int d = 0; d < 8; d++) sum.set(d, a[row][k + d], b[k + d][column]);
          warp[lane].c[i] = sum.rounded();
        }
      }
  } else if (operation == SHUFFLE) {
    float out[WARP];
    for (int lane = 0; lane < WARP; lane++) out[lane] = warp[lane ^ warp[lane].lanes].c[0];
    for (int lane = 0; lane < WARP; lane++) warp[lane].c[0] = out[lane];
  } else if (operation == VOTE) {
    unsigned votes = 0;
    for (int lane = 0; lane < WARP; lane++) votes |= unsigned(warp[lane].flag) << lane;
    for (int lane = 0; lane < WARP; lane++) warp[lane].votes = votes;
  } else if (operation == MEET) {
    Clock all = none();
    for (int lane = 0; lane < WARP; lane++) publish(first + lane, all);
    for (int lane = 0; lane < WARP; lane++) learn(clocks[first + lane], all);
  }
}

void execute_products(int first);  // of the warpgroup that begins there

[[gnu::noinline]] inline void meet(Collective operation) {
  Lane& lane = me();
  lane.operation = operation;
  lane.waiting = true;
  const int size = operation == PRODUCTS ? GROUP : WARP;
  const int first = current / size * size;
  for (int i = first; i < first + size; i++)
    if (!lanes[i].waiting) {
      suspend();
      return;
    }
  for (int i = first; i < first + size; i++)
    if (lanes[i].operation != operation) fail("lanes meet at different instructions");
  size == WARP ? execute(first) : execute_products(first);
  for (int i = first; i < first + size; i++) lanes[i].waiting = false;
}

inline void start() {
  body(parameters);
  if (!me().copies.empty()) fail("a thread ends before its copies arrive");
  if (!me().products.empty()) fail("a thread ends before its products");
  me().done = true;
  longjmp(scheduler, 1);
}

inline void resume(int index) {
  current = index;
  Lane& lane = lanes[index];
  if (_setjmp(scheduler)) return;
  if (lane.started) longjmp(lane.jump, 1);
  lane.started = true;
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = lane.stack.data();
  lane.context.uc_stack.ss_size = lane.stack.size();
  lane.context.uc_link = nullptr;
  makecontext(&lane.context, start, 0);
  setcontext(&lane.context);
}

bool phase_ended(unsigned barrier, unsigned parity);
void forget_barriers();
void check_registers();

inline bool can_run(const Lane& lane) {
  return !lane.done && lane.barrier < 0 && !lane.waiting && !lane.late &&
         !(lane.awaits && !phase_ended(lane.awaited, lane.parity));
}

// Threads that have all come to a barrier go on.
inline bool release_barriers() {
  bool any = false;
  for (int id = 0; id < NAMED_BARRIERS; id++) {
    std::vector<int> here;
    for (int i = 0; i < int(lanes.size()); i++)
      if (lanes[i].barrier == id) here.push_back(i);
    if (here.empty() || int(here.size()) != lanes[here[0]].barrier_threads) continue;
    Clock all = none();
    for (int i : here) publish(i, all);
    for (int i : here) learn(clocks[i], all), lanes[i].barrier = -1;
    any = true;
  }
  return any;
}

// The last copy that was started arrives, or any.
inline bool land_one() {
  if (flights.empty()) return false;
  const size_t which = shuffled ? roll(flights.size()) : flights.size() - 1;
  const Flight flight = flights[which];
  flights.erase(flights.begin() + which);
  land(flight);
  return true;
}

// The late lanes of the first warp that has some go on.
inline bool rouse() {
  const size_t warps = lanes.size() / WARP, start = shuffled ? roll(warps) : 0;
  for (size_t turn = 0; turn < warps; turn++) {
    const size_t first = (start + turn) % warps * WARP;
    bool any = false;
    for (int i = 0; i < WARP; i++) any |= lanes[first + i].late, lanes[first + i].late = false;
    if (any) return true;
  }
  return false;
}

// Who waits for what, of each warp its last thread that does.
[[noreturn, gnu::noinline]] inline void fail_of_deadlock() {
  char text[900] = "";
  for (int first = 0; first < int(lanes.size()); first += WARP) {
    int done = 0, in_warp = 0;
    const Lane* waits = nullptr;
    for (int i = first; i < first + WARP; i++) {
      const Lane& lane = lanes[i];
      done += lane.done, in_warp += lane.waiting;
      if (lane.barrier >= 0 || lane.awaits) waits = &lane;
    }
    if (done == WARP) continue;
    const size_t length = std::strlen(text), space = sizeof text - length;
    if (waits && waits->awaits)
      std::snprintf(text + length, space, " warp %d for the barrier at %u, parity %u;",
                    first / WARP, waits->awaited, waits->parity);
    else if (waits)
      std::snprintf(text + length, space, " warp %d at barrier %d;", first / WARP, waits->barrier);
    else
      std::snprintf(text + length, space, " warp %d with %d threads in an instruction of all;",
                    first / WARP, in_warp);
  }
  fail("nothing can go on:%s", text);
}

inline void run_block() {
  const int threads = int(lanes.size());
  std::memset(memory.data(), 0xff, memory.size());
  forget_order(threads, MOST_BARRIERS, memory.size());
  forget_barriers();
  flights.clear();
  for (Lane& lane : lanes) {
    lane.started = lane.done = lane.waiting = lane.awaits = lane.late = lane.open = false;
    lane.barrier = -1, lane.registers = 0;
    lane.copies.clear(), lane.products.clear(), lane.unfenced.clear();
  }
  while (failure.empty()) {
    // A warp runs until it waits; warps that wait for each other go on in the next round.
    for (bool any = true; any && failure.empty();) {
      any = false;
      for (int w = 0; w < threads / WARP; w++) {
        const int turn = reverse ? threads / WARP - 1 - w : w;
        const int first = (shuffled ? int(roll(threads / WARP)) : turn) * WARP;
        for (bool ran = true; ran && failure.empty();) {
          ran = false;
          for (int i = first; i < first + WARP && failure.empty(); i++)
            if (can_run(lanes[i])) resume(i), ran = true;
          any |= ran;
        }
      }
    }
    current = -1;
    if (!failure.empty()) return;
    int done = 0;
    for (Lane& lane : lanes) done += lane.done;
    if (done == threads) {
      if (!flights.empty()) fail("a block ends before its copies arrive");
      return check_registers();
    }
    if (shuffled && roll(2) && rouse()) continue;
    if (release_barriers() || land_one() || rouse()) continue;
    bool runs = false;  // a warp whose turn did not come, by chance
    for (const Lane& lane : lanes) runs |= can_run(lane);
    if (!runs) fail_of_deadlock();
  }
}

// Empty, or what went wrong.
inline std::string launch(void (*kernel)(const void*), const void* argument, int blocks,
                          int threads, int shared_bytes, int order) {
  failure.clear();
  body = kernel, parameters = argument;
  reverse = order == 1, shuffled = order > 1, seed = unsigned(order);
  memory.assign(size_t(shared_bytes), 0);
  lanes.resize(size_t(threads));
  for (Lane& lane : lanes) lane.stack.resize(64 << 10);
  for (int i = 0; i < blocks && failure.empty(); i++) {
    block = reverse ? blocks - 1 - i : i;
    current = -1;
    if (!_setjmp(launcher)) run_block();
  }
  return failure;
}

}  // namespace emulator

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
  for (size_t i = 0; i < flights.size();)  // copies that a barrier counts are this thread's, too
    if (flights[i].thread == current) {
      const Flight flight = flights[i];
      flights.erase(flights.begin() + i);
      land(flight);
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

#include "emulate_sm90.h"
