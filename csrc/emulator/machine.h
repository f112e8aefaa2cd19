// What the instructions of a warp or a warpgroup compute, barriers in shared memory, the copies
// that they count, and setmaxnreg.
//
// A wgmma is computed when its warpgroup waits for it, so a stage that was given back earlier is
// found overwritten or still being copied. A tensor map is the `Map` that
// tests/oisd_kernels/cuda/emulation.py encodes. Its boxes arrive as the hardware's would: with the
// 128-byte swizzle, zeros outside the tensor, and their bytes counted.
#pragma once

#include "emulate_rounding.h"
#include "state.h"

namespace emulator {

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

// An element of a matrix in shared memory with the 128-byte swizzle. `row` is along the
// descriptor's eight-row groups, `column` along the 128 bytes.
inline unsigned described_address(unsigned long long matrix, int row, int column) {
  if (matrix >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle");
  const unsigned start = (matrix & 0x3fff) << 4, half = (matrix >> 16 & 0x3fff) << 4;
  const unsigned eight = (matrix >> 32 & 0x3fff) << 4;
  const unsigned address =
      start + column / 64 * half + column % 64 * 2 + row / 8 * eight + row % 8 * 128;
  return address ^ (address >> 7 & 7) << 4;
}

// Elements [rows, columns] of a matrix, read by each warp of the group.
inline void read_matrix(int first, unsigned long long matrix, int rows, int columns, bool half,
                        float* to) {
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) {
      const unsigned address = described_address(matrix, row, column);
      uint16_t x;
      std::memcpy(&x, shared(address, 2), 2);
      to[row * columns + column] = element(half, x);
      if (column % 8 == 0)
        for (int warp = 0; warp < 4; warp++)
          check_read(first + warp * WARP, address / 16 * 16, 16, true);
    }
}

[[gnu::noinline]] inline void execute_product(int first, size_t index) {
  const Product& product = lanes[first].products[index];
  const bool half = product.half, from_registers = product.from_registers;
  const int width = product.width;
  static float a[64 * 16], stored[128 * 16], b[16][128];
  for (int lane = 0; lane < GROUP; lane++) {
    const Product& own = lanes[first + lane].products[index];
    if (own.right != product.right || own.left != product.left)
      fail("the lanes of a warpgroup differ in a descriptor");
    if (!from_registers) continue;
    for (int i = 0; i < 8; i++) {
      const int row = lane / WARP * 16 + left_element_row(lane % WARP, i);
      a[row * 16 + left_element_depth(lane % WARP, i)] = part(half, own.in[i / 2], i % 2);
    }
  }
  if (from_registers)
    read_matrix(first, product.right, 16, width, half, stored);
  else
    read_matrix(first, product.right, width, 16, half, stored);
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < width; n++)
      b[k][n] = from_registers ? stored[k * width + n] : stored[n * 16 + k];
  if (!from_registers) read_matrix(first, product.left, 64, 16, half, a);
  for (int lane = 0; lane < GROUP; lane++)
    for (int n = 0; n < width / 8; n++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / WARP * 16 + accumulator_row(lane % WARP) + 8 * (i / 2);
        const int column = 8 * n + accumulator_column(lane % WARP) + i % 2;
        float& accumulator = lanes[first + lane].products[index].sums[n][i];
        Sum<16> sum(accumulator);
        for (int k = 0; k < 16; k++) sum.set(k, a[row * 16 + k], b[k][column]);
        accumulator = sum.rounded();
      }
}

inline void execute_products(int first) {
  const size_t count = lanes[first].products.size();
  for (int lane = 0; lane < GROUP; lane++)
    if (lanes[first + lane].products.size() != count)
      fail("the lanes of a warpgroup issue different products");
  for (size_t i = 0; i < count; i++) execute_product(first, i);
  for (int lane = 0; lane < GROUP; lane++) lanes[first + lane].products.clear();
}

template <int N>
[[gnu::noinline]] inline void issue(Product product, float (&c)[N][4]) {
  if (!me().open) fail("a wgmma without a fence before it");
  product.sums = c, product.width = 8 * N;
  me().products.push_back(product);
}

// A barrier in shared memory. Its bytes there are not used, but accesses to them are checked.
struct Barrier {
  unsigned address;
  int expected, missing, bytes, phase, creator;
  bool fenced;
  Clock arriving, ended;  // what is known to the arrivals so far, and of the phases that ended
};
inline std::vector<Barrier> barriers;
inline int boxes;  // copied by tensor maps in this launch

inline Barrier& barrier_at(unsigned address) {
  for (Barrier& barrier : barriers)
    if (barrier.address == address) {
      if (current >= 0 && current != barrier.creator && clocks[current][barrier.creator] < 1)
        fail("uses a barrier before its creation is known");
      return barrier;
    }
  fail("there is no barrier at %u", address);
}
inline int clock_of(const Barrier& barrier) { return readers + int(&barrier - barriers.data()); }

inline bool phase_ended(unsigned address, unsigned parity) {
  for (const Barrier& barrier : barriers)
    if (barrier.address == address) return unsigned(barrier.phase & 1) != parity;
  return false;
}
inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  const int copies = clock_of(barrier);  // who waits for this phase knows its copies
  barrier.arriving[copies] = barrier.phase + 1;
  learn(barrier.ended, barrier.arriving);
  barrier.phase++;
  barrier.missing = barrier.expected;
}
inline void arrive(Barrier& barrier) {
  if (!barrier.missing) fail("arrives more often than a barrier expects");
  barrier.missing--;
  end_phase_if_complete(barrier);
}

// Written by tests/oisd_kernels/cuda/emulation.py in place of the driver's own format.
struct Map {
  unsigned long long address, sizes[3], strides[2];  // strides in bytes, of the second and third
  unsigned box[3], swizzle;
};

inline void complete_box(const PendingCopy& copy) {
  Map map;
  std::memcpy(&map, copy.map, sizeof map);
  const unsigned to = copy.to;
  const auto& at = copy.at;
  Barrier& counts = barrier_at(copy.barrier);
  const Cell landed = {clock_of(counts), counts.phase + 1, false};
  unsigned offset = 0;
  for (unsigned z = 0; z < map.box[2]; z++)
    for (unsigned y = 0; y < map.box[1]; y++)
      for (unsigned x = 0; x < map.box[0]; x++, offset += 2) {
        const long long place[3] = {at[0] + int(x), at[1] + int(y), at[2] + int(z)};
        bool inside = true;
        for (int i = 0; i < 3; i++)
          inside &= place[i] >= 0 && place[i] < (long long)map.sizes[i];
        unsigned address = to + offset;
        address ^= (address >> 7 & 7) << 4;
        const auto* from = reinterpret_cast<const unsigned char*>(map.address) + 2 * place[0] +
                           map.strides[0] * place[1] + map.strides[1] * place[2];
        unsigned char* data = shared(address, 2);
        inside ? std::memcpy(data, from, 2) : std::memset(data, 0, 2);
      }
  set_writer(to, offset, landed);
  counts.bytes -= int(offset);
  if (counts.bytes < 0) fail("more bytes arrive than a barrier expects");
  end_phase_if_complete(counts);
}

// The copies that a thread has issued, and its arrival once they are there.
inline void complete_copies(const PendingCopy& copy) {
  for (const Copy& one : copy.copies) {
    unsigned char* to = shared(one.to, one.bytes);
    one.from ? std::memcpy(to, one.from, one.bytes) : std::memset(to, 0, one.bytes);
    set_writer(one.to, one.bytes, {copy.thread, copy.epoch, true});
    for (unsigned i = 0; i < one.bytes; i += CELL)
      lanes[copy.thread].unfenced.push_back((one.to + i) / CELL);
  }
  Barrier& at = barrier_at(copy.barrier);
  learn(at.arriving, copy.known);
  arrive(at);
}

inline void complete(const PendingCopy& copy) {
  copy.map ? complete_box(copy) : complete_copies(copy);
}
inline void enqueue(const PendingCopy& copy) {
  reverse || (shuffled && random_below(2)) ? complete(copy) : pending.push_back(copy);
}

inline void set_registers(int count, bool more) {
  const int before = me().registers ? me().registers : 65536 / int(lanes.size()) / 8 * 8;
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg takes multiples of 8 from 24 on");
  if (more ? count < before : count > before) fail("setmaxnreg in the wrong direction");
  me().registers = count;
}
inline void check_registers() {
  const int threads = int(lanes.size()), before = 65536 / threads / 8 * 8;
  int sum = 0, set = 0;
  for (int i = 0; i < threads; i++) {
    sum += lanes[i].registers ? lanes[i].registers : before;
    set += lanes[i].registers != 0;
    if (lanes[i].registers != lanes[i / GROUP * GROUP].registers)
      fail("the threads of a warpgroup differ in setmaxnreg");
  }
  if (set && sum > before * threads) fail("setmaxnreg asks for more registers than a block has");
}


}  // namespace emulator
