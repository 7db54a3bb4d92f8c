// SPDX-License-Identifier: Apache-2.0
// The sum of attention weights over queries and heads, in the order that ../accumulate_scores.h prescribes.
#pragma once

#include "../accumulate_scores.h"
#include "block.cuh"
#include "element.cuh"

namespace fsdc::cuda {

// Weights of one token that a thread has asked for before it adds the first of them: of later heads and queries, so that
// the memory is busy while the sums go on in their order.
template <class Element, int kTokens>
constexpr int kWeightsAhead = (sizeof(Element) == 8 ? 16 : 32) / kTokens;

// delta[i] = the sum for token first + i * kThreads, for tokens below `end`, of which there is one at least.
template <class Element, int kThreads, int kTokens>
__device__ void sum_weights(const AccumulateScoresParams& params, int64_t batch, int64_t head, int64_t first,
                            int64_t end, float (&delta)[kTokens]) {
  constexpr int kAhead = kWeightsAhead<Element, kTokens>;
  const int left = clamp_to_int(end - first);
  int64_t offsets[kTokens];
  float sum[kTokens];
  FSDC_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    delta[i] = sum[i] = 0;
    // Beyond `end` the last token is read once more and not written: no branch around the loads.
    offsets[i] = (first + min(i * kThreads, left - 1)) * params.weight_token_stride;
  }

  // [G, Q, S] of this KV head, walked through head by head, query by query
  const Element* of_head = static_cast<const Element*>(params.weights) + batch * params.weight_batch_stride +
                           head * params.group * params.weight_head_stride;
  const int64_t to_next_query = params.weight_query_stride - params.group * params.weight_head_stride;
  const int group = static_cast<int>(params.group);
  int heads_to_load = group;
  Element loaded[kAhead][kTokens];
  const auto load = [&](Element(&weights)[kTokens]) {
    FSDC_UNROLL
    for (int i = 0; i < kTokens; ++i) weights[i] = __ldg(of_head + offsets[i]);
    of_head += params.weight_head_stride;
    if (--heads_to_load == 0) {
      heads_to_load = group;
      of_head += to_next_query;
    }
  };

  const int64_t count = params.queries * params.group;  // weights of one token
  FSDC_UNROLL
  for (int j = 0; j < kAhead; ++j) {
    if (j < count) load(loaded[j]);
  }
  const float* query_weight = params.query_weights;
  if (query_weight != nullptr) query_weight += batch * params.query_weight_batch_stride;
  int heads_to_add = group;
  for (int64_t begin = 0; begin < count; begin += kAhead) {
    const int weights_left = clamp_to_int(count - begin);
    FSDC_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (j >= weights_left) break;
      FSDC_UNROLL
      for (int i = 0; i < kTokens; ++i) sum[i] = add(sum[i], to_float(loaded[j][i]));
      if (j + kAhead < weights_left) load(loaded[j]);
      if (--heads_to_add != 0) continue;
      heads_to_add = group;
      float weight = 1;
      if (query_weight != nullptr) {
        weight = __ldg(query_weight);
        query_weight += params.query_weight_query_stride;
      }
      FSDC_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        if (weight != 0) delta[i] = add(delta[i], multiply(weight, sum[i]));
        sum[i] = 0;  // from +0 instead of the first head: delta is the same, it is never -0
      }
    }
  }
}

}  // namespace fsdc::cuda
