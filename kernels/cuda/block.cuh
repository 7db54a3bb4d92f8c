// SPDX-License-Identifier: Apache-2.0
// Prefix sums over the threads and warps of one block. Integers only, so the result knows no order.
#pragma once

#include "platform.cuh"

namespace fsdc::cuda {

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpThreads; }

// How many items are left, as far as an unrolled loop wants to know: 32 bits save it half the registers.
__device__ inline int clamp_to_int(int64_t count) { return static_cast<int>(min(count, int64_t{1} << 30)); }

struct BlockSum {
  uint32_t before;  // sum over the warps before this one
  uint32_t total;   // sum over all warps
};

// Every warp brings one value, the same in all its lanes. `slots` is shared memory, one per warp. One
// barrier: before the same slots are used again there must be another one.
template <int kThreads>
__device__ BlockSum sum_over_warps(uint32_t value, uint32_t* slots) {
  constexpr int kWarps = kThreads / kWarpThreads;
  static_assert(kThreads % kWarpThreads == 0 && kWarps <= kWarpThreads, "whole warps, at most 32 of them");
  if (lane_index() == 0) slots[warp_index()] = value;
  __syncthreads();
  const uint32_t slot = lane_index() < kWarps ? slots[lane_index()] : 0;
  const uint32_t before = __reduce_add_sync(kWholeWarp, lane_index() < warp_index() ? slot : 0);
  return {before, __reduce_add_sync(kWholeWarp, slot)};
}

// The sum of `value` over the threads before this one. `slots` and barriers as above.
template <int kThreads>
__device__ uint32_t block_exclusive_sum(uint32_t value, uint32_t* slots) {
  uint32_t inclusive = value;
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kWholeWarp, inclusive, static_cast<unsigned>(distance));
    if (lane_index() >= distance) inclusive += other;
  }
  const uint32_t warp_total = __shfl_sync(kWholeWarp, inclusive, kWarpThreads - 1);
  return sum_over_warps<kThreads>(warp_total, slots).before + inclusive - value;
}

}  // namespace fsdc::cuda
