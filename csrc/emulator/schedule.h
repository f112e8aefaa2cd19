// Which thread runs next. A warp runs until it waits. When no thread can run, a barrier is
// released, a pending copy completes, or late lanes wake; if none of these is possible, the block
// is deadlocked.
#pragma once

#include "machine.h"

namespace emulator {

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

inline bool can_run(const Lane& lane) {
  return !lane.done && lane.barrier < 0 && !lane.waiting && !lane.late &&
         !(lane.awaits && !phase_ended(lane.awaited, lane.parity));
}

// Threads continue once all that a barrier expects have reached it.
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

// The copy that was issued last completes or, if `shuffled`, any.
inline bool complete_one() {
  if (pending.empty()) return false;
  const size_t which = shuffled ? random_below(pending.size()) : pending.size() - 1;
  const PendingCopy copy = pending[which];
  pending.erase(pending.begin() + which);
  complete(copy);
  return true;
}

// The late lanes of the first warp that has some continue.
inline bool wake_late_lanes() {
  const size_t warps = lanes.size() / WARP, start = shuffled ? random_below(warps) : 0;
  for (size_t turn = 0; turn < warps; turn++) {
    const size_t first = (start + turn) % warps * WARP;
    bool any = false;
    for (int i = 0; i < WARP; i++) any |= lanes[first + i].late, lanes[first + i].late = false;
    if (any) return true;
  }
  return false;
}

// Reports what each warp waits for: its last thread that does.
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
  barriers.clear();
  pending.clear();
  for (Lane& lane : lanes) {
    lane.started = lane.done = lane.waiting = lane.awaits = lane.late = lane.open = false;
    lane.barrier = -1, lane.registers = 0;
    lane.copies.clear(), lane.products.clear(), lane.unfenced.clear();
  }
  while (failure.empty()) {
    // A warp runs until it waits; warps that wait for each other continue in the next round.
    for (bool any = true; any && failure.empty();) {
      any = false;
      for (int w = 0; w < threads / WARP; w++) {
        const int turn = reverse ? threads / WARP - 1 - w : w;
        const int first = (shuffled ? int(random_below(threads / WARP)) : turn) * WARP;
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
      if (!pending.empty()) fail("a block ends before its copies arrive");
      return check_registers();
    }
    if (shuffled && random_below(2) && wake_late_lanes()) continue;
    if (release_barriers() || complete_one() || wake_late_lanes()) continue;
    bool runs = false;  // a warp that was never chosen in a shuffle
    for (const Lane& lane : lanes) runs |= can_run(lane);
    if (!runs) fail_of_deadlock();
  }
}

// Empty, or the error.
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
