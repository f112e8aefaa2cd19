// The instructions of primitives_sm90.h on a CPU.
//
// A wgmma is computed when its warpgroup waits for it: a stage that was given back before then is
// found overwritten, or in flight. A tensor map here is what tests/emulation.py encodes, `Map`; its
// boxes land as the driver's would, with the 128-byte swizzle, zeros outside of the tensor, and
// their bytes counted.
#pragma once

namespace emulator {

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

// Elements [rows, columns] of a matrix, which each warp of the group reads.
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

// A barrier in shared memory. Its bytes there are not used, only guarded.
struct Barrier {
  unsigned address;
  int expected, missing, bytes, phase, creator;
  bool fenced;
  Clock arriving, ended;  // what its arrivals know; of phases that have ended
};
inline std::vector<Barrier> barriers;
inline int boxes;  // copied by tensor maps in this launch

inline void forget_barriers() { barriers.clear(); }
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
  const int copies = clock_of(barrier);  // those of this phase are known to who waits for it
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

// What tests/emulation.py writes where the driver would write its own.
struct Map {
  unsigned long long address, sizes[3], strides[2];  // strides in bytes, of the second and third
  unsigned box[3], swizzle;
};

inline void land_box(const Flight& flight) {
  Map map;
  std::memcpy(&map, flight.map, sizeof map);
  const unsigned to = flight.to;
  const auto& at = flight.at;
  Barrier& counts = barrier_at(flight.barrier);
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

// The copies that a thread has started, and its arrival once they have come.
inline void land_copies(const Flight& flight) {
  for (const Copy& copy : flight.copies) {
    unsigned char* to = shared(copy.to, copy.bytes);
    copy.from ? std::memcpy(to, copy.from, copy.bytes) : std::memset(to, 0, copy.bytes);
    set_writer(copy.to, copy.bytes, {flight.thread, flight.epoch, true});
    for (unsigned i = 0; i < copy.bytes; i += CELL)
      lanes[flight.thread].unfenced.push_back((copy.to + i) / CELL);
  }
  Barrier& at = barrier_at(flight.barrier);
  learn(at.arriving, flight.known);
  arrive(at);
}

inline void land(const Flight& flight) { flight.map ? land_box(flight) : land_copies(flight); }
inline void take_off(const Flight& flight) {
  reverse || (shuffled && roll(2)) ? land(flight) : flights.push_back(flight);
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
  // Whatever lies there is overwritten: an access of tiles would see an unknown writer.
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
  if (shuffled ? roll(2) : reverse && current % WARP) me().late = true, suspend();
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
  Flight flight = {thread, barrier, me().copies, clocks[thread][thread], none(), nullptr, 0, {}};
  me().copies.clear();
  publish(thread, flight.known);
  take_off(flight);
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
  take_off({current, barrier, {}, 0, {}, &map, to, {column, head, row}});
}

template <int COUNT>
inline void fewer_registers() {
  emulator::set_registers(COUNT, false);
}
template <int COUNT>
inline void more_registers() {
  emulator::set_registers(COUNT, true);
}
