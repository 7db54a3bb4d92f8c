// SPDX-License-Identifier: Apache-2.0
// The kernel of accumulate_scores.cu (see there) and how it is launched.
#pragma once

#include <limits>

#include "../accumulate_scores.h"
#include "weight_sums.cuh"

namespace fsdc::cuda {

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

  float delta[kTokensPerThread];
  sum_weights<Element, kThreads>(params, batch, head, first, params.tokens, delta);

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

inline bool are_aligned(const AccumulateScoresParams& params) {
  return is_aligned(params.scores, sizeof(float)) && is_aligned(params.weights, element_size(params.dtype)) &&
         is_aligned(params.query_weights, sizeof(float)) && is_aligned(params.carry, sizeof(float));
}

constexpr int kAccumulateScoresThreads = 128;  // per block, as shipped; tests run smaller ones too

template <int kThreads>
cudaError_t launch_accumulate_scores_kernel(const AccumulateScoresParams& params, cudaStream_t stream) {
  constexpr int64_t kTileTokens = kThreads * kTokensPerThread;
  const int64_t tiles = (params.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t blocks = params.batch * params.heads * tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;  // of a grid
  if (!are_aligned(params)) return cudaErrorMisalignedAddress;
  return with_element(params.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    const Grid grid{.blocks = static_cast<unsigned>(blocks), .threads = kThreads};
    return launch(accumulate_scores_kernel<Element, kThreads>, grid, stream, params, static_cast<uint32_t>(tiles));
  });
}

}  // namespace fsdc::cuda
