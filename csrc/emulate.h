// The primitives of a GPU on a CPU: the kernels' own source runs block by block, each thread a
// fibre.
//
// A warp's lanes meet at every collective instruction, and must meet at the same one. Between two
// barriers the warps run one after the other, in the order that `emulator::reverse` says: a missing
// barrier shows as a result that depends on it. An asynchronous copy arrives when its thread waits
// for it, not before. Shared memory starts as NaN, every access is checked for bounds and
// alignment. Single-threaded; for tests.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <ucontext.h>
#include <vector>

#define OISD_DEVICE inline
#define OISD_KERNEL(threads, blocks) void

namespace emulator {

enum Collective { NONE, MATRICES, MATRICES_TRANSPOSED, MULTIPLY, SHUFFLE, ANY, SCORES, ROWS };
constexpr int WARPGROUP = 4 * WARP;

struct Copy {
  unsigned to, bytes;
  const void* from;  // null: zeros
};

struct Lane {
  ucontext_t context;
  jmp_buf jump;
  std::vector<char> stack;
  bool started, done, at_barrier, waiting;
  Collective operation;
  unsigned in[4], address, b[2];
  float c[4];
  int lanes;
  bool flag, half;
  unsigned long long left, right;  // matrix descriptors
  float (*sums)[4];                // accumulators of a wgmma
  int width;                       // their columns
  bool unfenced;                   // copies have arrived, but no fence for wgmma
  std::vector<Copy> copies;
};

inline std::vector<unsigned char> memory;
inline std::vector<Lane> lanes;
inline int current, block;
inline bool reverse, fenced;
inline jmp_buf scheduler;
inline ucontext_t starter;
inline void (*body)(const void*);
inline const void* parameters;
inline std::string failure;

[[noreturn]] inline void fail(const std::string& message) {
  if (failure.empty())
    failure =
        message + " (block " + std::to_string(block) + ", thread " + std::to_string(current) + ")";
  longjmp(scheduler, 1);
}

inline Lane& me() { return lanes[current]; }

inline unsigned char* shared(unsigned address, unsigned bytes) {
  if (address % bytes) fail("misaligned shared address " + std::to_string(address));
  if (size_t(address) + bytes > memory.size())
    fail("shared address " + std::to_string(address) + " out of bounds");
  return memory.data() + address;
}

inline void suspend() {
  if (!_setjmp(me().jump)) longjmp(scheduler, 1);
}

inline float float_of(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline unsigned round_bfloat16(float x) {
  unsigned bits = bits_of(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline unsigned round_float16(float x) {
  const unsigned sign = (bits_of(x) >> 16) & 0x8000;
  const float a = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (a >= 65520.f) return sign | 0x7c00;
  // The spacing of float16 at x; rint rounds half to even.
  int exponent = a > 0 ? std::ilogb(a) : -14;
  exponent = exponent < -14 ? -14 : exponent;
  const int units = int(std::rint(std::ldexp(a, 10 - exponent)));  // up to 2048
  return sign | unsigned(units + ((exponent + 14) << 10));
}
inline float from_float16(unsigned h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float x = exponent == 31  ? (mantissa ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(float(mantissa), -24)
                            : std::ldexp(float(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -x : x;
}
inline float element(bool half, unsigned bits) {
  return half ? from_float16(bits & 0xffff) : float_of(bits << 16);
}
inline float part(bool half, unsigned word, int i) {
  return element(half, word >> (16 * i) & 0xffff);
}

// All lanes of the warp that begins at `first` have posted their operands.
inline void execute(int first) {
  Lane* warp = &lanes[first];
  const Collective operation = warp[0].operation;
  if (operation == MATRICES || operation == MATRICES_TRANSPOSED) {
    unsigned out[WARP][4];
    for (int lane = 0; lane < WARP; lane++)
      for (int i = 0; i < 4; i++) {
        auto at = [&](int row, int column) {
          uint16_t x;
          std::memcpy(&x, shared(warp[8 * i + row].address, 16) + 2 * column, 2);
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
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
        warp[lane].c[i] += sum;
      }
  } else if (operation == SHUFFLE) {
    float out[WARP];
    for (int lane = 0; lane < WARP; lane++) out[lane] = warp[lane ^ warp[lane].lanes].c[0];
    for (int lane = 0; lane < WARP; lane++) warp[lane].c[0] = out[lane];
  } else if (operation == ANY) {
    bool any = false;
    for (int lane = 0; lane < WARP; lane++) any |= warp[lane].flag;
    for (int lane = 0; lane < WARP; lane++) warp[lane].flag = any;
  }
}

// An element of a matrix in shared memory with the 128-byte swizzle. `row` is along the
// descriptor's eight-row groups, `column` along the 128 bytes.
inline unsigned described(unsigned long long matrix, int row, int column) {
  if (matrix >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle");
  const unsigned start = (matrix & 0x3fff) << 4, half = (matrix >> 16 & 0x3fff) << 4;
  const unsigned eight = (matrix >> 32 & 0x3fff) << 4;
  unsigned address = start + column / 64 * half + column % 64 * 2 + row / 8 * eight + row % 8 * 128;
  address ^= (address >> 7 & 7) << 4;
  uint16_t x;
  std::memcpy(&x, shared(address, 2), 2);
  return x;
}

inline void execute_group(int first) {
  Lane* group = &lanes[first];
  const bool half = group[0].half;
  const int width = group[0].width;
  if (!fenced) fail("wgmma reads copies that were not fenced");
  static float a[64][16], b[16][128];
  for (int lane = 0; lane < WARPGROUP; lane++) {
    if (group[lane].right != group[0].right)
      fail("the lanes of a warpgroup differ in a descriptor");
    if (group[lane].operation != ROWS) continue;
    for (int i = 0; i < 8; i++)
      a[lane / WARP * 16 + left_element_row(lane % WARP, i)][left_element_depth(lane % WARP, i)] =
          part(half, group[lane].in[i / 2], i % 2);
  }
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < width; n++)
      b[k][n] = element(half, group[0].operation == ROWS ? described(group[0].right, k, n)
                                                         : described(group[0].right, n, k));
    for (int m = 0; m < 64 && group[0].operation == SCORES; m++)
      a[m][k] = element(half, described(group[0].left, m, k));
  }
  for (int lane = 0; lane < WARPGROUP; lane++)
    for (int n = 0; n < width / 8; n++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / WARP * 16 + accumulator_row(lane % WARP) + 8 * (i / 2);
        const int column = 8 * n + accumulator_column(lane % WARP) + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
        group[lane].sums[n][i] += sum;
      }
}

inline void meet(Collective operation) {
  Lane& lane = me();
  lane.operation = operation;
  lane.waiting = true;
  const int size = operation == SCORES || operation == ROWS ? WARPGROUP : WARP;
  const int first = current / size * size;
  for (int i = first; i < first + size; i++)
    if (!lanes[i].waiting) {
      suspend();
      return;
    }
  for (int i = first; i < first + WARP; i++)
    if (lanes[i].operation != operation) fail("lanes meet at different instructions");
  size == WARP ? execute(first) : execute_group(first);
  for (int i = first; i < first + size; i++) lanes[i].waiting = false;
}

inline void start() {
  body(parameters);
  if (!me().copies.empty()) fail("a thread ends before its copies arrive");
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

inline void run_block() {
  const int threads = int(lanes.size());
  for (size_t i = 0; i + 1 < memory.size(); i += 2) memory[i] = memory[i + 1] = 0xff;
  for (Lane& lane : lanes)
    lane.started = lane.done = lane.at_barrier = lane.waiting = lane.unfenced = false,
    lane.copies.clear();
  while (failure.empty()) {
    // A warp runs until it waits; warps that wait for each other go on in the next round.
    for (bool any = true; any && failure.empty();) {
      any = false;
      for (int w = 0; w < threads / WARP; w++) {
        const int first = (reverse ? threads / WARP - 1 - w : w) * WARP;
        for (bool ran = true; ran && failure.empty();) {
          ran = false;
          for (int i = first; i < first + WARP && failure.empty(); i++)
            if (!lanes[i].done && !lanes[i].at_barrier && !lanes[i].waiting) resume(i), ran = true;
          any |= ran;
        }
      }
    }
    if (!failure.empty()) return;
    int done = 0, at_barrier = 0;
    for (Lane& lane : lanes) done += lane.done, at_barrier += lane.at_barrier;
    if (done == threads) return;
    if (at_barrier != threads)
      failure = "not all threads of block " + std::to_string(block) + " reach a barrier";
    fenced = true;
    for (Lane& lane : lanes) lane.at_barrier = false, fenced &= !lane.unfenced;
  }
}

// Empty, or what went wrong.
inline std::string launch(void (*kernel)(const void*), const void* argument, int blocks,
                          int threads, int shared_bytes, bool reversed) {
  failure.clear();
  body = kernel, parameters = argument, reverse = reversed;
  memory.assign(size_t(shared_bytes), 0);
  lanes.resize(size_t(threads));
  for (Lane& lane : lanes) lane.stack.resize(64 << 10);
  for (int i = 0; i < blocks && failure.empty(); i++) {
    block = reversed ? blocks - 1 - i : i;
    run_block();
  }
  return failure;
}

}  // namespace emulator

inline int thread_index() { return emulator::current; }
inline int block_index() { return emulator::block; }
inline unsigned shared_base() { return 0; }

inline void copy_async_16(unsigned to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("misaligned source of a copy");
  emulator::me().copies.push_back({to, 16, valid ? from : nullptr});
}
inline void copy_async_4(unsigned to, const void* from, bool valid) {
  emulator::me().copies.push_back({to, 4, valid ? from : nullptr});
}
inline void copy_async_commit() {}
inline void copy_async_wait_all() {
  for (const emulator::Copy& copy : emulator::me().copies) {
    unsigned char* to = emulator::shared(copy.to, copy.bytes);
    copy.from ? std::memcpy(to, copy.from, copy.bytes) : std::memset(to, 0, copy.bytes);
  }
  emulator::me().unfenced |= !emulator::me().copies.empty();
  emulator::me().copies.clear();
}
inline void barrier() {
  emulator::me().at_barrier = true;
  emulator::suspend();
}

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

inline void emulated_multiply(bool half, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                              unsigned b1) {
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

inline float exp2_of(float x) { return std::exp2(x); }
inline float log2_of(float x) { return std::log2(x); }

inline Pair load_shared_pair(unsigned address) {
  Pair p;
  std::memcpy(&p, emulator::shared(address, 8), 8);
  return p;
}
inline int uniform(int x) { return x; }
inline float shuffle_xor(float x, int lanes) {
  emulator::me().c[0] = x, emulator::me().lanes = lanes;
  emulator::meet(emulator::SHUFFLE);
  return emulator::me().c[0];
}
inline bool any_of_warp(bool x) {
  emulator::me().flag = x;
  emulator::meet(emulator::ANY);
  return emulator::me().flag;
}

inline void fence_for_warpgroups() { emulator::me().unfenced = false; }
inline void warpgroup_begin() {}
inline void warpgroup_end() {}
inline void keep_in_place(float&) {}
inline void keep_in_place(unsigned&) {}

template <int N>
inline void emulated_warpgroup(bool half, emulator::Collective operation, float (&c)[N][4],
                               unsigned long long left, unsigned long long right) {
  emulator::Lane& lane = emulator::me();
  lane.half = half, lane.left = left, lane.right = right, lane.sums = c, lane.width = 8 * N;
  emulator::meet(operation);
}
inline bool is_half(Bfloat16) { return false; }
inline bool is_half(Float16) { return true; }
template <class ELEMENT, int N>
inline void warpgroup_scores(ELEMENT element, float (&c)[N][4], unsigned long long a,
                             unsigned long long b) {
  emulated_warpgroup(is_half(element), emulator::SCORES, c, a, b);
}
template <class ELEMENT, int N>
inline void warpgroup_rows(ELEMENT element, float (&c)[N][4], const unsigned (&a)[4],
                           unsigned long long b) {
  std::memcpy(emulator::me().in, a, 16);
  emulated_warpgroup(is_half(element), emulator::ROWS, c, 0, b);
}
