// SPDX-License-Identifier: Apache-2.0
// The sum of attention weights over queries and heads, in the order that ../accumulate_scores.h prescribes.
#pragma once

#include "../accumulate_scores.h"
#include "block.cuh"
#include "element.cuh"

namespace fsdc::cuda {

constexpr int kTokensPerThread = 4;  // times this many heads: the loads of one thread in flight
constexpr int kHeadsAhead = 4;

// delta[i] = the sum for token first + i * kThreads, for tokens below `end`, of which there is one at least.
template <class Element, int kThreads>
__device__ void sum_weights(const AccumulateScoresParams& params, int64_t batch, int64_t head, int64_t first,
                            int64_t end, float (&delta)[kTokensPerThread]) {
  const int left = clamp_to_int(end - first);
  int64_t offsets[kTokensPerThread];
  FSDC_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    delta[i] = 0;
    // Beyond `end` the last token is read once more and not written: no branch around the loads.
    offsets[i] = (first + min(i * kThreads, left - 1)) * params.weight_token_stride;
  }

  // [G, Q, S] of this KV head
  const Element* const weights = static_cast<const Element*>(params.weights) + batch * params.weight_batch_stride +
                                 head * params.group * params.weight_head_stride;
  for (int64_t query = 0; query < params.queries; ++query) {
    float query_weight = 1;
    if (params.query_weights != nullptr) {
      query_weight = __ldg(params.query_weights + batch * params.query_weight_batch_stride +
                           query * params.query_weight_query_stride);
    }
    if (query_weight == 0) continue;
    const Element* of_head = weights + query * params.weight_query_stride;
    float sum[kTokensPerThread] = {};  // from +0 instead of the first head: delta is the same, it is never -0
    for (int64_t g = 0; g < params.group; g += kHeadsAhead) {
      const int heads_left = clamp_to_int(params.group - g);
      Element loaded[kHeadsAhead][kTokensPerThread];
      FSDC_UNROLL
      for (int j = 0; j < kHeadsAhead; ++j) {
        if (j >= heads_left) break;
        FSDC_UNROLL
        for (int i = 0; i < kTokensPerThread; ++i) loaded[j][i] = __ldg(of_head + offsets[i]);
        of_head += params.weight_head_stride;
      }
      FSDC_UNROLL
      for (int j = 0; j < kHeadsAhead; ++j) {
        if (j >= heads_left) break;
        FSDC_UNROLL
        for (int i = 0; i < kTokensPerThread; ++i) sum[i] = add(sum[i], to_float(loaded[j][i]));
      }
    }
    FSDC_UNROLL
    for (int i = 0; i < kTokensPerThread; ++i) delta[i] = add(delta[i], multiply(query_weight, sum[i]));
  }
}

}  // namespace fsdc::cuda
