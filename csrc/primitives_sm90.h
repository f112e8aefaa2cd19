// Instructions of sm_90a: wgmma, barriers in shared memory, copies by tensor maps.
#pragma once

// wgmma, of a warpgroup (four warps) at a time; asynchronous between begin and end.

// What this thread wrote to shared memory is then seen by wgmma, and not overtaken by copy_box.
OISD_DEVICE void fence_for_warpgroups() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
OISD_DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
OISD_DEVICE void warpgroup_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
#define OISD_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define OISD_C32 \
  OISD_C4(0), OISD_C4(1), OISD_C4(2), OISD_C4(3), OISD_C4(4), OISD_C4(5), OISD_C4(6), OISD_C4(7)
#define OISD_C64                                                                        \
  OISD_C32, OISD_C4(8), OISD_C4(9), OISD_C4(10), OISD_C4(11), OISD_C4(12), OISD_C4(13), \
      OISD_C4(14), OISD_C4(15)
#define OISD_D32                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define OISD_D64                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// c [64, 64] += a b^T, both [64 rows, 16 deep] in shared memory.
#define OISD_WARPGROUP_SCORES(ELEMENT, type)                                              \
  OISD_DEVICE void warpgroup_scores(ELEMENT, float (&c)[8][4], unsigned long long a,      \
                                    unsigned long long b) {                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " OISD_D32 \
                 ", %32, %33, 1, 1, 1, 0, 0;"                                             \
                 : OISD_C32                                                               \
                 : "l"(a), "l"(b));                                                       \
  }
// c [64, K] += a [64, 16 deep] b [16 deep, K], a in registers, b in shared memory.
#define OISD_WARPGROUP_ROWS(ELEMENT, type, n, K, D, C, a0, a1, a2, a3, b0)                     \
  OISD_DEVICE void warpgroup_rows(ELEMENT, float (&c)[n][4], const unsigned (&a)[4],           \
                                  unsigned long long b) {                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" K "k16.f32." type "." type " " D ", {" a0 \
                 ", " a1 ", " a2 ", " a3 "}, " b0 ", 1, 1, 1, 1;"                              \
                 : C                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
  }
#define OISD_WARPGROUP(ELEMENT, type)                                                           \
  OISD_WARPGROUP_SCORES(ELEMENT, type)                                                          \
  OISD_WARPGROUP_ROWS(ELEMENT, type, 8, "64", OISD_D32, OISD_C32, "%32", "%33", "%34", "%35",   \
                      "%36")                                                                    \
  OISD_WARPGROUP_ROWS(ELEMENT, type, 16, "128", OISD_D64, OISD_C64, "%64", "%65", "%66", "%67", \
                      "%68")
OISD_WARPGROUP(Bfloat16, "bf16")
OISD_WARPGROUP(Float16, "f16")

// A barrier in shared memory, of 8 bytes: a phase ends when `arrivals` arrivals and all bytes that
// were announced have come. What was done before an arrival is seen after a wait for its phase.
OISD_DEVICE void barrier_create(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By the thread that created them; then a barrier of the block makes them known to all.
OISD_DEVICE void fence_created_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
OISD_DEVICE void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// An arrival once all copy_async of this thread have come.
OISD_DEVICE void copy_async_arrive(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// The current phase also waits for `bytes` of copies. No arrival.
OISD_DEVICE void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity; the phase before the first one has parity 1.
OISD_DEVICE void barrier_wait(unsigned barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}
// A barrier of the block's first `threads` threads.
OISD_DEVICE void barrier_of(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// The box of `map` at (column, head, row), whose bytes go to `barrier`. Elements that lie outside
// of the tensor become zero, and are counted.
OISD_DEVICE void copy_box(unsigned to, const TensorMap& map, int column, int head, int row,
                          unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(barrier)
      : "memory");
}

// Registers of each thread of this warpgroup from here on.
template <int COUNT>
OISD_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
OISD_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
