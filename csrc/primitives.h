// What the kernels ask of the machine: index of the thread, asynchronous copies into shared memory,
// ldmatrix, mma.sync, shuffles. On a GPU each is one instruction (sm_80 and later); compiled for
// the host, emulate.h runs the same kernels on a CPU.
//
// Shared memory is addressed by 32-bit byte offsets, elements are 16-bit patterns, and no CUDA
// header is needed.
#pragma once

#include "layout.h"

struct Bfloat16 {};
struct Float16 {};

struct Pair {
  float x, y;
};

#if !defined(__CUDACC__)
#include "emulate.h"
#else

#define OISD_DEVICE __device__ __forceinline__
#define OISD_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

OISD_DEVICE int thread_index() { return threadIdx.x; }
OISD_DEVICE int block_index() { return blockIdx.x; }

extern __shared__ __align__(1024) unsigned char oisd_shared[];
OISD_DEVICE unsigned shared_base() {
  return static_cast<unsigned>(__cvta_generic_to_shared(oisd_shared));
}

// 16 bytes, or zeros where not `valid`: the address must be readable all the same.
OISD_DEVICE void copy_async_16(unsigned to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}
OISD_DEVICE void copy_async_4(unsigned to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0)
               : "memory");
}
OISD_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
OISD_DEVICE void copy_async_wait_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
OISD_DEVICE void barrier() { __syncthreads(); }

OISD_DEVICE void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
OISD_DEVICE void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

OISD_DEVICE void multiply_add(Bfloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                              unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
OISD_DEVICE void multiply_add(Float16, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                              unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The first argument goes to the lower half.
OISD_DEVICE unsigned pack(Bfloat16, float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
OISD_DEVICE unsigned pack(Float16, float low, float high) {
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
OISD_DEVICE Pair unpack(Bfloat16, unsigned r) {
  return {__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u)};
}
OISD_DEVICE Pair unpack(Float16, unsigned r) {
  Pair p;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(p.x), "=f"(p.y)
      : "r"(r));
  return p;
}

OISD_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
OISD_DEVICE float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

OISD_DEVICE Pair load_shared_pair(unsigned address) {
  Pair p;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(p.x), "=f"(p.y) : "r"(address) : "memory");
  return p;
}
// x, which is the same in all lanes: the compiler then knows it.
OISD_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
OISD_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
OISD_DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }

// wgmma, of a warpgroup (four warps) at a time; asynchronous between begin and end.
OISD_DEVICE void fence_for_warpgroups() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
OISD_DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
OISD_DEVICE void warpgroup_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
OISD_DEVICE void keep_in_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }
OISD_DEVICE void keep_in_place(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

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

#endif
