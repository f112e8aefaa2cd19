// The instructions that the kernels use: index of the thread, asynchronous copies into shared
// memory, ldmatrix, mma.sync, shuffles; primitives_sm90.h has those of sm_90a. On a GPU each is one
// instruction (sm_80 and later). Compiled for the host, emulator/ runs the same kernels on a CPU.
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

struct Quad {
  unsigned word[4];
};

// What the driver makes of a tensor's address, sizes and strides, for copy_box; aligned as cuda.h's
// CUtensorMap is.
struct alignas(128) TensorMap {
  unsigned long long word[16];
};

#if !defined(__CUDACC__)
#include "emulator/emulate.h"
#include "emulator/emulate_sm90.h"
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
// For all of this thread, in a group or not: cp.async.wait_group waits for groups alone.
OISD_DEVICE void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
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
OISD_DEVICE Quad load_shared_quad(unsigned address) {
  Quad q;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
               : "r"(address)
               : "memory");
  return q;
}
OISD_DEVICE void store_shared_quad(unsigned address, const Quad& q) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(q.word[0]),
               "r"(q.word[1]), "r"(q.word[2]), "r"(q.word[3])
               : "memory");
}
// x, which is the same in all lanes: the compiler then knows it.
OISD_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
OISD_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
OISD_DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
OISD_DEVICE unsigned votes_of_warp(bool x) { return __ballot_sync(0xffffffffu, x); }  // bit: lane

OISD_DEVICE void warp_barrier() { __syncwarp(); }  // orders its lanes' accesses to memory
OISD_DEVICE void keep_in_place(float& x) { asm volatile("" : "+f"(x)::"memory"); }
OISD_DEVICE void keep_in_place(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

#include "primitives_sm90.h"
#endif
