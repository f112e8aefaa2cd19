// The kernels of one unit: -DOISD_ELEMENT=Bfloat16|Float16 -DOISD_TILE=NAME_K of attention_tiles.h
// -DOISD_DIVERGENCE=NO_DIVERGENCE|JSD|FORWARD_KL|REVERSE_KL. Its names are the same in every unit.
#include "attention_backward.h"
#include "attention_prepare.h"
#include "attention_statistics.h"

using Element = OISD_ELEMENT;
using Sizes = OISD_TILE;
constexpr Divergence DIVERGENCE = OISD_DIVERGENCE;

#if !defined(__CUDACC__)
#define __grid_constant__
#endif

// `align`: the alignment alone; `fused`: with attention's own gradient; `plain`: that alone.
#define OISD_BACKWARD(name, plain)                                        \
  extern "C" OISD_KERNEL(PREPARE_THREADS, 1)                              \
      prepare_##name(const __grid_constant__ PrepareParams p) {           \
    attention_prepare<Element, Sizes::HEAD, DIVERGENCE, plain>(p);        \
  }                                                                       \
  extern "C" OISD_KERNEL(Sizes::THREADS, 1)                               \
      backward_keys_##name(const __grid_constant__ BackwardParams p) {    \
    attention_backward<Element, Sizes, DIVERGENCE, plain, true>(p);       \
  }                                                                       \
  extern "C" OISD_KERNEL(Sizes::THREADS, 1)                               \
      backward_queries_##name(const __grid_constant__ BackwardParams p) { \
    attention_backward<Element, Sizes, DIVERGENCE, plain, false>(p);      \
  }

#define OISD_IS_NO_DIVERGENCE 1
#define OISD_IS_JSD 2
#define OISD_IS_FORWARD_KL 2
#define OISD_IS_REVERSE_KL 2
#define OISD_IS(divergence) OISD_IS_(divergence)
#define OISD_IS_(divergence) OISD_IS_##divergence

#if OISD_IS(OISD_DIVERGENCE) == 1
OISD_BACKWARD(plain, true)
#else
OISD_BACKWARD(align, false)
OISD_BACKWARD(fused, true)
extern "C" OISD_KERNEL(Sizes::THREADS, 1) statistics(const __grid_constant__ StatisticsParams p) {
  attention_statistics<Element, Sizes, DIVERGENCE>(p);
}
#endif
