// SPDX-License-Identifier: Apache-2.0
// The kernel of accumulate_scores.cu (see there) and how it is launched.
#pragma once

#include <limits>

#include "../accumulate_scores.h"
#include "block.cuh"
#include "element.cuh"

namespace fsdc::cuda {

constexpr int kTokensPerThread = 4;  // times this many heads: the loads of one thread in flight
constexpr int kHeadsAhead = 4;

__device__ inline bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    accumulate_scores_kernel(const AccumulateScoresParams params, uint32_t tiles) {
  const uint32_t row = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x % tiles;
  const int64_t batch = row / static_cast<uint32_t>(params.heads);
  const int64_t head = row % static_cast<uint32_t>(params.heads);
  const int64_t first = tile * (kThreads * kTokensPerThread) + threadIdx.x;
  if (first >= params.tokens) return;
  const int left = clamp_to_int(params.tokens - first);

  int64_t offsets[kTokensPerThread];
  float delta[kTokensPerThread] = {};
  FSDC_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    // Beyond the end the last token is read once more and not written: no branch around the loads.
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

  const float carry = params.carry != nullptr ? __ldg(params.carry + batch * params.carry_stride) : 1;
  float* const scores = params.scores + batch * params.score_batch_stride + head * params.score_head_stride;
  FSDC_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    if (i * kThreads >= left) break;
    float* const score = scores + (first + i * kThreads) * params.score_token_stride;
    if (params.overwrite) {
      *score = delta[i];
    } else if (is_finite(*score)) {
      *score = add(multiply(carry, *score), delta[i]);
    }
  }
}

template <int kThreads>
cudaError_t launch_accumulate_scores_kernel(const AccumulateScoresParams& params, cudaStream_t stream) {
  constexpr int64_t kTileTokens = kThreads * kTokensPerThread;
  const int64_t tiles = (params.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t blocks = params.batch * params.heads * tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;  // of a grid
  return with_element(params.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    const dim3 grid(static_cast<unsigned>(blocks));
    return launch(accumulate_scores_kernel<Element, kThreads>, grid, kThreads, 0, stream, params,
                  static_cast<uint32_t>(tiles));
  });
}

}  // namespace fsdc::cuda
