// SPDX-License-Identifier: Apache-2.0
// accumulate_scores: add the attention weights of new queries to the scores of their KV head.
//
//   delta = 0
//   for q ascending:  if query_weights[b, q] != 0:
//       t = p[b, h * G, q, s];  for g = 1 .. G - 1:  t = t + p[b, h * G + g, q, s]
//       delta = delta + query_weights[b, q] * t
//   scores[b, h, s] = carry[b] * scores[b, h, s] + delta         left as it is where it is not finite
//
// Every step is rounded to fp32 and none is fused, so that CPU, CUDA and reference agree bit for bit; work may be
// split over b, h and s only. Weights of another type are rounded to fp32 once, when read. Weights must not share
// memory with the scores.
#pragma once

#include "types.h"

namespace fsdc {

struct AccumulateScoresParams {
  int64_t batch;    // B
  int64_t heads;    // H
  int64_t group;    // G
  int64_t queries;  // Q
  int64_t tokens;   // S
  bool overwrite;   // scores = delta, the old ones are not read; on the CPU a single weight is copied, -0 and all
  DType dtype;      // of the weights
  float* scores;    // [B, H, S]
  int64_t score_batch_stride;
  int64_t score_head_stride;
  int64_t score_token_stride;
  const void* weights;  // [B, H * G, Q, S]; any stride may be 0
  int64_t weight_batch_stride;
  int64_t weight_head_stride;
  int64_t weight_query_stride;
  int64_t weight_token_stride;
  const float* query_weights;  // [B, Q], null: all 1
  int64_t query_weight_batch_stride;
  int64_t query_weight_query_stride;
  const float* carry;  // [B], null: all 1
  int64_t carry_stride;
};

}  // namespace fsdc
