// SPDX-License-Identifier: Apache-2.0
// From products of new keys with all keys to each token's largest cosine with a newer one.
#pragma once

#include "block.cuh"
#include "votes.cuh"

namespace fsdc::cuda {

// A NaN stays.
template <class Number>
__device__ Number larger(Number a, Number b) {
  return b > a || b != b ? b : a;
}

// Raises the redundancy of the block's tokens. Its "queries" are new keys, one lane each; threads as in vote_kernel.
template <class Number, int kThreads>
__global__ void __launch_bounds__(kThreads)
    raise_redundancy_kernel(const ChunkAttentionParams params, const ChunkBlock block) {
  using Word = Access<kTokensOfThread* static_cast<int>(sizeof(Number))>;
  constexpr int kWarps = kThreads / kWarpThreads;
  constexpr int kAhead = 4;  // loads of one thread in flight
  FSDC_SHARED(cosines, TokenSums<Number, kThreads>);
  const int64_t tiles = (block.tokens + kTokensOfBlock - 1) / kTokensOfBlock;
  const int64_t place = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTokensOfBlock + lane_index() * kTokensOfThread;
  const ChunkRow row(params, block.row_at(place), block.first_token);
  const Sight sight(params, row, block.held);
  const float* const scales = row.facts(params, kKeyScalePlane);
  const int end = first < block.tokens ? static_cast<int>(block.queries) : 0;
  const Number* const products =
      static_cast<const Number*>(block.logits) + place * block.queries * block.stride + first;

  Number largest[kTokensOfThread] = {};
  for (int begin = warp_index(); begin < end; begin += kWarps * kAhead) {
    Word words[kAhead];
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int lane = begin + i * kWarps;
      if (lane < end) words[i] = *reinterpret_cast<const Word*>(products + lane * block.stride);
    }
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int lane = begin + i * kWarps;
      if (lane >= end) break;
      const int64_t newer = block.held + block.first_query + lane;
      if (!sight.is_there(newer)) continue;
      const Pack<Number, kTokensOfThread> pack = unpack<Number, kTokensOfThread>(words[i]);
      FSDC_UNROLL
      for (int token = 0; token < kTokensOfThread; ++token) {
        if (first + token < newer) largest[token] = larger(largest[token], pack.items[token] * scales[newer]);
      }
    }
  }
  FSDC_UNROLL
  for (int i = 0; i < kTokensOfThread; ++i) cosines.of[warp_index()][lane_index() * kTokensOfThread + i] = largest[i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTokensOfBlock; i += kThreads) {
    const int64_t token = blockIdx.x % tiles * kTokensOfBlock + i;
    if (token >= block.tokens || !sight.is_there(token)) continue;
    Number found = 0;
    for (int warp = 0; warp < kWarps; ++warp) found = larger(found, cosines.of[warp][i]);
    float& redundancy = row.facts(params, kRedundancyPlane)[token];
    redundancy = larger(redundancy, to_float(found) * scales[token]);
  }
}

}  // namespace fsdc::cuda
