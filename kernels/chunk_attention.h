// SPDX-License-Identifier: Apache-2.0
// chunk_attention: many new tokens for every row of a cache: attend to the tokens held and to each other, and add that
// attention to the scores. Nothing is evicted; truncate follows.
//
// Of T_h tokens held and Q new ones, S_h = T_h + Q. For each (batch, KV head), query q and query head g of its group:
//
//   l[q, g, j] = query[q, g] . k[j] * scaling, softcap * tanh(l / softcap) if there is one
//   p          = softmax of l over the tokens that q sees, the attention sinks and the entry of the evicted
//   out[q, g]  = sum over j of p[q, g, j] * v[j], and p[q, g, entry] times the entry's value
//   s[j]      <- carry * s[j] + sum over q of query_weights[q] * sum over g of p[q, g, j]   left as it is if not finite
//   r[j]      <- max(r[j], the largest cosine of k[j] and a newer new key)                  if `redundancy`
//
// A query sees the tokens held and of the new ones those up to itself, or those that `sees` names. An empty slot or
// padding has position -1, is seen by nobody and contributes nothing whatever bytes it holds. A query of weight 0
// attends, but does not vote. A query that sees nothing has output 0.
//
// Sums are fp32 (fp64 for fp64), in an order that depends on shapes and the instruction set only: the same bits on every
// run and for any number of threads. The specification is chunk_attention_ in operators/reference.py.
#pragma once

#include "types.h"

namespace fsdc {

// Vectors of tokens, [B, heads, tokens, dim] with a contiguous last dimension; of unequal heads [B, rows, dim].
struct TokenVectors {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;  // unused with `head_layout`
  int64_t token_stride;
  int64_t dim;
};

struct ChunkAttentionParams {
  int64_t batch;    // B
  int64_t heads;    // H
  int64_t group;    // G
  int64_t queries;  // Q
  int64_t held;     // T, the most that a head holds
  DType dtype;      // of query, keys and values

  // Per head {its first row, T_h}, [H, 2]: keys, values, facts and positions lie flat, the Q new tokens of a head behind
  // those it holds. On the host. Null: every head holds T.
  const int32_t* head_layout;

  TokenVectors query;   // [B, H * G, Q, D]
  TokenVectors keys;    // [B, H, S, D]
  TokenVectors values;  // [B, H, S, Dv]

  // fp32 [4, B, H, S], last dimension contiguous: scores, value weights, redundancy, key scales (1 over the keys'
  // lengths). Null: nobody votes.
  float* facts;
  int64_t fact_plane_stride;
  int64_t fact_batch_stride;
  int64_t fact_head_stride;
  const int32_t* positions;  // [B, H, S], last dimension contiguous; null: no token is missing
  int64_t position_batch_stride;
  int64_t position_head_stride;
  const float* query_weights;  // [B, Q]; null: all 1
  int64_t query_weight_batch_stride;
  int64_t query_weight_query_stride;
  const float* carry;  // [B]; null: all 1
  int64_t carry_stride;
  bool redundancy;
  const bool* sees;  // [B, Q, Q], query by new token; null: all up to itself
  int64_t sees_batch_stride;
  int64_t sees_query_stride;
  int64_t sees_token_stride;

  double scaling;
  double softcap;     // 0: none
  const void* sinks;  // attention sinks [H * G], contiguous; null: none
  DType sinks_dtype;

  // The entry of the evicted tokens, contiguous; null: none. Sums are fp32, fp64 for fp64.
  const void* skipped_keys;      // [B, H, D]
  const void* skipped_values;    // [B, H, Dv]
  const int32_t* skipped_count;  // [B, H]
  float* lost;                   // [B, H]: mean share of the voting queries' attention that the entry received
  bool skipped_mean;             // it counts as n tokens of their mean; false: as one, their literal sum

  void* output;  // [B, H * G, Q, Dv] contiguous
};

// The planes of `facts` that are read or written.
constexpr int64_t kScorePlane = 0, kRedundancyPlane = 2, kKeyScalePlane = 3;

}  // namespace fsdc
