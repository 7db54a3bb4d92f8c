// SPDX-License-Identifier: Apache-2.0
// The kernel of accumulate_scores.cu (see there) and how it is launched.
#pragma once

#include <limits>

#include "../accumulate_scores.h"
#include "element.cuh"

namespace fsdc::cuda {

constexpr int kTokensPerThread = 4;  // independent sums, so that this many loads are in flight

__device__ inline bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads) accumulate_scores_kernel(const AccumulateScoresParams params, int64_t tiles) {
  const int64_t row = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x % tiles;
  const int64_t batch = row / params.heads;
  const int64_t head = row % params.heads;
  const int64_t first = tile * (kThreads * kTokensPerThread) + threadIdx.x;
  if (first >= params.tokens) return;

  int64_t tokens[kTokensPerThread];
  int64_t offsets[kTokensPerThread];
  float delta[kTokensPerThread] = {};
  FSDC_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    tokens[i] = first + i * kThreads;
    // Beyond the end the last token is read once more and not written: no branch around the loads.
    offsets[i] = min(tokens[i], params.tokens - 1) * params.weight_token_stride;
  }

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
    float sum[kTokensPerThread];
    FSDC_UNROLL
    for (int i = 0; i < kTokensPerThread; ++i) sum[i] = to_float(__ldg(of_head + offsets[i]));
    for (int64_t g = 1; g < params.group; ++g) {
      of_head += params.weight_head_stride;
      FSDC_UNROLL
      for (int i = 0; i < kTokensPerThread; ++i) sum[i] = add(sum[i], to_float(__ldg(of_head + offsets[i])));
    }
    FSDC_UNROLL
    for (int i = 0; i < kTokensPerThread; ++i) delta[i] = add(delta[i], multiply(query_weight, sum[i]));
  }

  const float carry = params.carry != nullptr ? __ldg(params.carry + batch * params.carry_stride) : 1;
  float* const scores = params.scores + batch * params.score_batch_stride + head * params.score_head_stride;
  FSDC_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    if (tokens[i] >= params.tokens) break;
    float* const score = scores + tokens[i] * params.score_token_stride;
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
    return launch(accumulate_scores_kernel<Element, kThreads>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                  params, tiles);
  });
}

}  // namespace fsdc::cuda
