// One unit of attention.cu on a CPU: `emulate` launches a kernel by its name.
#include "../attention.cu"

template <auto KERNEL, class Params>
static void call(const void* argument) {
  Params params;  // aligned for its tensor maps, as the caller's copy need not be
  std::memcpy(&params, argument, sizeof params);
  KERNEL(params);
}

// Empty, or the error. `order` 0 runs blocks and warps forwards, 1 in reverse; any larger one is the
// seed of a shuffle.
extern "C" const char* emulate(const char* name, const void* params, int blocks, int threads,
                               int shared_bytes, int order) {
  static std::string message;
  const auto run = [&](void (*kernel)(const void*)) {
    emulator::boxes = 0;
    message = emulator::launch(kernel, params, blocks, threads, shared_bytes, order);
  };
  message = "no such kernel";
#define OISD_TRY(kernel, Params) \
  if (std::string(name) == #kernel) run(call<kernel, Params>)
#define OISD_TRY_BACKWARD(kind)                   \
  OISD_TRY(prepare_##kind, PrepareParams);        \
  OISD_TRY(backward_keys_##kind, BackwardParams); \
  OISD_TRY(backward_queries_##kind, BackwardParams)
#if OISD_IS(OISD_DIVERGENCE) == 1
  OISD_TRY_BACKWARD(plain);
#else
  OISD_TRY_BACKWARD(align);
  OISD_TRY_BACKWARD(fused);
  OISD_TRY(statistics, StatisticsParams);
#endif
  return message.c_str();
}

// Boxes that tensor maps copied in the last launch.
extern "C" int boxes_copied() { return emulator::boxes; }

// Sizes that the launcher computes, too, for a test to compare.
extern "C" int shared_bytes(int tensors) { return Sizes::shared_bytes(tensors); }
extern "C" int threads() { return Sizes::THREADS; }
extern "C" int size_of(const char* name) {
  const std::string params = name;
  return params == "statistics" ? sizeof(StatisticsParams)
         : params == "prepare"  ? sizeof(PrepareParams)
                                : sizeof(BackwardParams);
}

// Behind the last key that queries from `first` on see, in a sequence of `length`.
extern "C" int last_streamed(int first, int length, int left, int right) {
  Layout layout = {};
  layout.left = left, layout.right = right;
  int begin, end;
  streamed_range<false, Sizes::OWN, Sizes::STREAMED>(layout, {0, length, first}, begin, end);
  return end;
}

// The index functions, for tests of the memory banks and of the lanes.
extern "C" int offset_of(int row, int chunk) { return tile_offset<Sizes::OWN>(row, chunk); }
extern "C" int lane_offset(const char* operand, int lane) {
  const Engine<Element, Sizes, WARP_ENGINE> engine(lane);
  const std::string name = operand;
  return name == "left" ? engine.left : name == "right" ? engine.right : engine.transposed;
}
extern "C" void element_of(const char* operand, int lane, int i, int* row, int* column) {
  const std::string name = operand;
  *row = name == "left"    ? left_element_row(lane, i)
         : name == "right" ? right_element_depth(lane, i)
                           : accumulator_row(lane) + 8 * (i / 2);
  *column = name == "left"    ? left_element_depth(lane, i)
            : name == "right" ? right_element_column(lane)
                              : accumulator_column(lane) + i % 2;
}

// The matrix descriptors of one product of tiles at address 0, in order: `which` is "own" or
// "streamed" of the scores, or "rows". Their number.
extern "C" int descriptors(const char* which, unsigned long long* to) {
  if constexpr (Sizes::ENGINE == WARP_ENGINE) return 0;
  else {
    emulator::lanes.resize(1);
    emulator::Lane& lane = emulator::lanes[emulator::current = 0];
    lane.products.clear(), lane.open = true;
    const Engine<Element, Sizes> engine(0);
    const bool rows = std::string(which) == "rows";
    static float scores[Sizes::STREAMED / 8][4], sums[Sizes::HEAD / 8][4];
    static const unsigned left[Sizes::STREAMED / 16][4] = {};
    rows ? engine.rows(sums, left, 0) : engine.scores(scores, 0, 0);
    for (const emulator::Product& product : lane.products)
      *to++ = std::string(which) == "own" ? product.left : product.right;
    return int(lane.products.size());
  }
}
