// SPDX-License-Identifier: Apache-2.0
// Which token of a row goes: the eviction score of docs/eviction.md, in the order of kernels/score_order.h.
#pragma once

#include <limits>

#include "kernels/score_order.h"
#include "row.cuh"

namespace fsdc::cuda {

// A token that may go. The one with the least code does: empty slots, finite eviction scores, NaN, +inf; of equal
// scores the smaller position. Of empty slots, which have position -1, the first.
struct Candidate {
  uint64_t code;
  int32_t slot;
};

__device__ constexpr Candidate nobody() { return {~uint64_t{0}, std::numeric_limits<int32_t>::max()}; }

__device__ inline Candidate least(const Candidate& a, const Candidate& b) {
  return b.code < a.code || (b.code == a.code && b.slot < a.slot) ? b : a;
}

// Every rounding is that of the CPU's kernel.
struct EvictionRule {
  template <class T>
  __device__ EvictionRule(const DecodeAttentionParams& p, const DecodeRow<T>& row, int32_t position)
      : prior(multiply(p.prior, static_cast<float>(p.group))),
        redundancy(p.redundancy),
        value_weight(p.value_weight),
        first_recent(position + 1 - row.recent_tokens),
        sink_tokens(row.sink_tokens) {}

  __device__ Candidate candidate(float s, float weight, float r, int32_t position, int64_t slot) const {
    const float rated =
        multiply(multiply(add(s, prior), value_weight ? weight : 1.0f), add(1.0f, -multiply(redundancy, r)));
    float eviction = is_finite(s) ? rated : s;
    if (position >= first_recent || position < sink_tokens) eviction = std::numeric_limits<float>::infinity();
    if (position < 0) eviction = -std::numeric_limits<float>::infinity();
    const uint64_t code = score_code(__float_as_uint(eviction));
    return {code << 32 | static_cast<uint32_t>(position), static_cast<int32_t>(slot)};
  }

  float prior, redundancy;
  bool value_weight;
  int64_t first_recent, sink_tokens;
};

// The least over the threads of a block; whole in thread 0.
template <int kThreads>
__device__ Candidate block_least(Candidate candidate) {
  constexpr int kWarps = kThreads / kWarpThreads;
  FSDC_SHARED(of_warps, Candidate[kWarps]);
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    candidate = least(candidate, {__shfl_xor_sync(kWholeWarp, candidate.code, distance),
                                  __shfl_xor_sync(kWholeWarp, candidate.slot, distance)});
  }
  if (lane_index() == 0) of_warps[warp_index()] = candidate;
  __syncthreads();
  if (threadIdx.x == 0) {
    FSDC_NO_UNROLL
    for (int warp = 1; warp < kWarps; ++warp) candidate = least(candidate, of_warps[warp]);
  }
  return candidate;
}

}  // namespace fsdc::cuda
