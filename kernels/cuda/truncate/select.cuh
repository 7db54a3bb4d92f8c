// SPDX-License-Identifier: Apache-2.0
// Which tokens of a row stay: their indices, in token order.
#pragma once

#include "threshold.cuh"

namespace fsdc::cuda {

// The threshold with the tie rule turned into a token: of equal ones those from `first_equal` on stay. Good for the
// tokens of the block that has it.
struct Boundary {
  uint32_t prefix;
  int shift;
  int64_t first_equal;

  __device__ bool keeps(uint32_t code, int64_t token) const {
    const uint32_t digits = code >> shift;
    return digits > prefix || (digits == prefix && token >= first_equal);
  }
};

// Tokens above and at the threshold.
struct Counts {
  uint32_t greater;
  uint32_t equal;
};

// Of the blocks before this one in its team.
template <int kThreads, class Codes>
__device__ Counts count_before(const Codes& codes, const Team& team, const Threshold& threshold) {
  constexpr uint32_t kMostBlocks = 8;
  FSDC_SHARED(mine, Counts);
  FSDC_SHARED(all, Counts[kMostBlocks]);
  if (team.blocks == 1) return {0, 0};
  if (threadIdx.x == 0) mine = {0, 0};
  __syncthreads();
  Counts counts{0, 0};
  for (int64_t token = threadIdx.x; token < team.tokens; token += kThreads) {
    const uint32_t digits = codes(token) >> threshold.shift;
    counts.greater += digits > threshold.prefix ? 1 : 0;
    counts.equal += digits == threshold.prefix ? 1 : 0;
  }
  counts = {__reduce_add_sync(kWholeWarp, counts.greater), __reduce_add_sync(kWholeWarp, counts.equal)};
  if (lane_index() == 0) {
    atomicAdd(&mine.greater, counts.greater);
    atomicAdd(&mine.equal, counts.equal);
  }
  __syncthreads();
  if (threadIdx.x < team.blocks) cluster_map(&all[0], threadIdx.x)[team.rank] = mine;
  cluster_sync();
  Counts before{0, 0};
  for (uint32_t rank = 0; rank < team.rank; ++rank) {
    before.greater += all[rank].greater;
    before.equal += all[rank].equal;
  }
  return before;
}

// indices[rank] = token for the kept tokens of this block with a rank in [first_rank, end_rank), ascending. A warp
// holds kItems times 32 tokens in a row, so a ballot gives their order.
template <int kThreads, class Codes>
__device__ Boundary write_indices(const Codes& codes, const Team& team, const Threshold& threshold, int64_t first_rank,
                                  int64_t end_rank, int64_t* indices) {
  constexpr int kItems = Codes::kItems;  // tokens of one thread, 32 apart
  constexpr int kWarpTokens = kWarpThreads * kItems;
  constexpr int kBlockTokens = kThreads * kItems;
  static_assert(kBlockTokens < 1 << 16, "two counts share a word");
  FSDC_SHARED(slots, uint32_t[2][kThreads / kWarpThreads]);  // in turns: one barrier a round is enough
  FSDC_SHARED(first_equal, int64_t);

  Counts seen = count_before<kThreads>(codes, team, threshold);
  // Unless this block has the first equal token that stays: then all of its equal ones do, or none.
  if (threadIdx.x == 0) first_equal = team.first_token + (seen.equal > threshold.skip ? 0 : team.tokens);
  const uint32_t lanes_before = (1u << lane_index()) - 1;
  int turn = 0;
  for (int64_t round = 0; round < team.tokens; round += kBlockTokens, turn ^= 1) {
    const int64_t first = round + warp_index() * kWarpTokens + lane_index();
    const int left = clamp_to_int(team.tokens - first);
    uint32_t greater[kItems];  // bit l: the token of lane l
    uint32_t equal[kItems];
    uint32_t counts = 0;  // equal in the high half, greater in the low half
    uint32_t digits[kItems];
    FSDC_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int offset = i * kWarpThreads;
      digits[i] = offset < left ? codes(first + offset) >> threshold.shift : 0;
    }
    FSDC_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const bool exists = i * kWarpThreads < left;
      greater[i] = __ballot_sync(kWholeWarp, exists && digits[i] > threshold.prefix);
      equal[i] = __ballot_sync(kWholeWarp, exists && digits[i] == threshold.prefix);
      counts += static_cast<uint32_t>(__popc(greater[i]) | __popc(equal[i]) << 16);
    }
    const BlockSum sum = sum_over_warps<kThreads>(counts, slots[turn]);
    uint32_t greater_before = seen.greater + (sum.before & 0xffff);
    uint32_t equal_before = seen.equal + (sum.before >> 16);
    FSDC_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int64_t token = team.first_token + first + i * kWarpThreads;
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
    seen.greater += sum.total & 0xffff;
    seen.equal += sum.total >> 16;
  }
  team_sync(team.blocks);  // all indices are there, for all
  return {threshold.prefix, threshold.shift, first_equal};
}

}  // namespace fsdc::cuda
