// Arguments of the attention kernels; oisd_kernels/cuda/params.py holds the same structures.
//
// Packed: N tokens, H query heads, J key heads, B sequences. Query i and key j, counted within
// their sequence, meet where -left <= j - i <= right.
#pragma once

#include "primitives.h"

// [N, heads, K], 16-bit elements; strides in elements, the last one is 1.
struct Operand {
  void* data;
  long long row, head;
};

// Of the tensors of a call, [N, heads, K] with boxes of BOX_ROWS rows and 64 columns; read by
// specialized blocks alone.
struct StatisticsMaps {
  TensorMap q, k, q_teacher, k_teacher;
};
struct BackwardMaps {
  TensorMap q, k, v, d_out, q_teacher, k_teacher;
};

struct Layout {
  const int* cu_seqlens;  // [B + 1]
  const int* tiles;       // [B + 1]: sequence b owns tiles tiles[b] : tiles[b + 1] of `own` rows
  int sequences, tokens;
  int left, right;
  int heads, key_heads, key_heads_teacher;  // H, J and the teacher's J
  int pad;
};

struct StatisticsParams {
  StatisticsMaps maps;
  Operand q, k, q_teacher, k_teacher;
  const float* lse;           // [H, N], natural logarithm
  const float* lse_teacher;   // [H, N]
  const unsigned char* keep;  // [N], or null: all rows
  float* value;               // [H, N]
  float* statistic;           // [H, N], or null for forward_kl
  Layout layout;
  float scale, scale_teacher;   // times log2(e)
  float log2_beta, log2_other;  // log2(beta), log2(1 - beta)
  int pad[14];
};

struct PrepareParams {
  Operand out, d_out;
  const float* lse;             // [H, N]
  const float* lse_teacher;     // [H, N]
  const float* statistic;       // [H, N], or null for forward_kl
  const float* d_lse;           // [H, N], or null: zero
  const float* row_weight;      // [N]
  const float* gradient_scale;  // [1], or null: one
  float* lse2;                  // [H, N]: base-2 logarithm, finite
  float* lse2_teacher;          // [H, N]: likewise
  float* delta;                 // [H, N]: what is subtracted from dP
  float* factor;                // [N]: of the alignment term
  int heads, tokens;
  float beta;
  int pad;
};

struct BackwardParams {
  BackwardMaps maps;
  Operand q, k, v, d_out, q_teacher, k_teacher;
  Operand d_query, d_key, d_value;
  const float* lse2;  // as written by prepare
  const float* lse2_teacher;
  const float* delta;
  const float* factor;
  const float* gradient_scale;
  Layout layout;
  float scale2, scale2_teacher;  // of the scores, times log2(e)
  float scale;                   // of the scores
  float log2_ratio;              // log2(beta / (1 - beta))
  int pad[16];
};
