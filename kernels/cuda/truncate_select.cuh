// SPDX-License-Identifier: Apache-2.0
// Which tokens of a row stay: find the key of the last one by radix, then write the indices in token order.
//
// Nothing is sorted and no candidate is buffered: a buffer can overflow and then drops tokens silently. The
// scores are read again in each pass, from L1 as far as they fit there.
#pragma once

#include "../score_order.h"
#include "block.cuh"

namespace fsdc::cuda {

__device__ inline uint32_t key_of(const float* scores, int index) {
  return score_key(__float_as_uint(__ldg(scores + index)));
}

// The key of the last kept token, as far as it had to be found out: the bits from `shift` up. Of the tokens
// with these bits the first `skip` go, because of equal scores the newer stays.
struct Threshold {
  uint32_t prefix;
  int shift;
  uint32_t skip;
};

// The same, with the tie rule turned into a token index: equal tokens stay from `first_equal` on.
struct Boundary {
  uint32_t prefix;
  int shift;
  int64_t first_equal;

  __device__ bool keeps(uint32_t key, int64_t token) const {
    const uint32_t digits = key >> shift;
    return digits > prefix || (digits == prefix && token >= first_equal);
  }
};

// Digits of 11, 11 and 10 bits, the highest first: count them (integers: no order, so deterministic), find
// the digit at which `kept` tokens are reached from the top, go on among the tokens with this digit.
// 1 <= kept < tokens < 2^32.
template <int kThreads>
__device__ Threshold find_threshold(const float* scores, int64_t tokens, uint32_t kept) {
  constexpr int kBins = 1 << 11;
  constexpr int kBinsPerThread = kBins / kThreads;
  constexpr int kAhead = 8;  // loads of one thread in flight
  static_assert(kBins % kThreads == 0);
  struct Bin {
    uint32_t digit;
    uint32_t above;  // tokens with a larger digit
    uint32_t count;
  };
  FSDC_SHARED(histogram, uint32_t[kBins]);
  FSDC_SHARED(slots, uint32_t[kThreads / kWarpThreads]);
  FSDC_SHARED(last, Bin);

  Threshold threshold{0, 32, 0};
  for (int pass = 0; pass < 3; ++pass) {
    const int bits = pass < 2 ? 11 : 10;
    threshold.shift -= bits;
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();

    for (int64_t first = threadIdx.x; first < tokens; first += kThreads * kAhead) {
      const int left = clamp_to_int(tokens - first);
      uint32_t keys[kAhead];
      FSDC_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        keys[i] = i * kThreads < left ? key_of(scores + first, i * kThreads) : 0;
      }
      FSDC_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const uint32_t digits = keys[i] >> threshold.shift;
        const bool counts = i * kThreads < left && digits >> bits == threshold.prefix;
        if (counts) atomicAdd(&histogram[digits & ((1u << bits) - 1)], 1u);
      }
    }
    __syncthreads();

    // The bins of this thread go down from `top`, those of the threads before it lie above.
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
    uint32_t mine = 0;
    for (int i = 0; i < kBinsPerThread; ++i) mine += histogram[top - i];
    uint32_t above = block_exclusive_sum<kThreads>(mine, slots);
    for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t count = histogram[top - i];
      if (above < kept && kept <= above + count) last = {static_cast<uint32_t>(top - i), above, count};
      above += count;
    }
    __syncthreads();

    threshold.prefix = threshold.prefix << bits | last.digit;
    kept -= last.above;
    threshold.skip = last.count - kept;
    if (threshold.skip == 0) break;  // all of this digit stay: the lower digits do not matter
  }
  return threshold;
}

// indices[rank] = token for the kept tokens with a rank in [first_rank, end_rank), ascending. The whole block
// sees them on return. A warp holds kItems times 32 tokens in a row, so a ballot gives their order.
template <int kThreads>
__device__ Boundary write_indices(const float* scores, int64_t tokens, Threshold threshold, int64_t first_rank,
                                  int64_t end_rank, int64_t* indices) {
  constexpr int kItems = 8;  // tokens of one thread, 32 apart
  constexpr int kWarpTokens = kWarpThreads * kItems;
  constexpr int kBlockTokens = kThreads * kItems;
  static_assert(kBlockTokens < 1 << 16, "two counts share a word");
  FSDC_SHARED(slots, uint32_t[2][kThreads / kWarpThreads]);  // in turns: one barrier a round is enough
  FSDC_SHARED(first_equal, int64_t);

  const uint32_t lanes_before = (1u << lane_index()) - 1;
  uint32_t greater_seen = 0;
  uint32_t equal_seen = 0;
  int turn = 0;
  for (int64_t round = 0; round < tokens; round += kBlockTokens, turn ^= 1) {
    const int64_t first = round + warp_index() * kWarpTokens + lane_index();
    const int left = clamp_to_int(tokens - first);
    uint32_t greater[kItems];  // bit l: the token of lane l
    uint32_t equal[kItems];
    uint32_t counts = 0;  // equal in the high half, greater in the low half
    uint32_t digits[kItems];
    FSDC_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int offset = i * kWarpThreads;
      digits[i] = offset < left ? key_of(scores + first, offset) >> threshold.shift : 0;
    }
    FSDC_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const bool exists = i * kWarpThreads < left;
      greater[i] = __ballot_sync(kWholeWarp, exists && digits[i] > threshold.prefix);
      equal[i] = __ballot_sync(kWholeWarp, exists && digits[i] == threshold.prefix);
      counts += static_cast<uint32_t>(__popc(greater[i]) | __popc(equal[i]) << 16);
    }
    const BlockSum sum = sum_over_warps<kThreads>(counts, slots[turn]);
    uint32_t greater_before = greater_seen + (sum.before & 0xffff);
    uint32_t equal_before = equal_seen + (sum.before >> 16);
    FSDC_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int64_t token = first + i * kWarpThreads;
      const bool is_greater = (greater[i] >> lane_index() & 1) != 0;
      const bool is_equal = (equal[i] >> lane_index() & 1) != 0;
      const uint32_t equal_rank = equal_before + static_cast<uint32_t>(__popc(equal[i] & lanes_before));
      const uint32_t equal_kept = equal_rank - min(equal_rank, threshold.skip);
      const int64_t rank = int64_t{greater_before} + __popc(greater[i] & lanes_before) + equal_kept;
      const bool kept = is_greater || (is_equal && equal_rank >= threshold.skip);
      if (kept && rank >= first_rank && rank < end_rank) indices[rank] = token;
      if (is_equal && equal_rank == threshold.skip) first_equal = token;
      greater_before += static_cast<uint32_t>(__popc(greater[i]));
      equal_before += static_cast<uint32_t>(__popc(equal[i]));
    }
    greater_seen += sum.total & 0xffff;
    equal_seen += sum.total >> 16;
  }
  __syncthreads();
  return {threshold.prefix, threshold.shift, first_equal};
}

// Select `kept` of `tokens` and write the indices of the ranks in [first_rank, end_rank).
template <int kThreads>
__device__ Boundary select_tokens(const float* scores, int64_t tokens, int64_t kept, int64_t first_rank,
                                  int64_t end_rank, int64_t* indices) {
  if (kept == 0) return {~0u, 0, tokens};
  if (kept == tokens) {
    for (int64_t rank = first_rank + threadIdx.x; rank < end_rank; rank += kThreads) indices[rank] = rank;
    __syncthreads();
    return {0, 0, 0};
  }
  const Threshold threshold = find_threshold<kThreads>(scores, tokens, static_cast<uint32_t>(kept));
  return write_indices<kThreads>(scores, tokens, threshold, first_rank, end_rank, indices);
}

}  // namespace fsdc::cuda
