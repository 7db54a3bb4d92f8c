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
  const int64_t token = tile * kThreads + threadIdx.x;
  if (token >= params.tokens) return;

  float delta[1];
  sum_weights<Element, kThreads>(params, batch, head, token, params.tokens, delta);

  const float carry = params.carry != nullptr ? __ldg(params.carry + batch * params.carry_stride) : 1;
  float& score = params.scores[batch * params.score_batch_stride + head * params.score_head_stride +
                               token * params.score_token_stride];
  if (params.overwrite) {
    score = delta[0];
  } else if (is_finite(score)) {
    score = add(multiply(carry, score), delta[0]);
  }
}

inline bool are_aligned(const AccumulateScoresParams& params) {
  return is_aligned(params.scores, sizeof(float)) && is_aligned(params.weights, element_size(params.dtype)) &&
         is_aligned(params.query_weights, sizeof(float)) && is_aligned(params.carry, sizeof(float));
}

constexpr int kAccumulateScoresThreads = 128;  // per block, as shipped; tests run smaller ones too

template <int kThreads>
cudaError_t launch_accumulate_scores_kernel(const AccumulateScoresParams& params, cudaStream_t stream) {
  const int64_t tiles = (params.tokens + kThreads - 1) / kThreads;
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
