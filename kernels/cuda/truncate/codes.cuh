// SPDX-License-Identifier: Apache-2.0
// The codes (kernels/score_order.h) of the tokens that a block looks at, and how often each first digit is among them.
#pragma once

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/weight_sums.cuh"
#include "kernels/score_order.h"
#include "kernels/truncate.h"
#include "plan.h"

namespace fsdc::cuda {

constexpr int kTokensPerThread = 4;  // whose weights one thread sums at a time
constexpr int kBins = 1 << 11;
constexpr int kFirstShift = 20;
constexpr uint32_t kNotNegative = 1u << 31;  // the code of +0, and of -0

// Of codes from that of zero on; lower ones have digit 0 too (threshold.cuh).
__device__ inline uint32_t first_digit(uint32_t code) {
  return (max(code, kNotNegative) - kNotNegative) >> kFirstShift;
}

// Where a block finds the codes of its tokens.
enum class CodeSource { kScoresStreamed, kScoresOnChip, kWeightSumsOnChip };

// The blocks that select one row together, and the part of this one.
struct Team {
  uint32_t rank;
  uint32_t blocks;
  int64_t first_token;
  int64_t tokens;  // of this block; may be 0
};

__device__ inline Team team_of(int64_t tokens, uint32_t cluster) {
  const uint32_t rank = cluster == 1 ? 0 : cluster_rank();
  const int64_t per_block = tokens_per_block(tokens, cluster);
  const int64_t first = min(rank * per_block, tokens);
  return {rank, cluster, first, min(per_block, tokens - first)};
}

// Made anew from the scores each time, from L1 as far as they fit there: for rows of any length.
struct StreamedCodes {
  static constexpr bool kFirstDigitIsCounted = false;
  static constexpr int kItems = 4;  // with 6 sm_86 and sm_89 spill registers
  const float* scores;              // of this block's first token
  __device__ uint32_t operator()(int64_t token) const { return score_code(__float_as_uint(__ldg(scores + token))); }
};

// In shared memory. While they were brought there, their first digits were counted.
struct CodesOnChip {
  static constexpr bool kFirstDigitIsCounted = true;
  static constexpr int kItems = 8;
  const uint32_t* codes;
  __device__ uint32_t operator()(int64_t token) const { return codes[token]; }
};

__device__ inline void bring_code(float score, int64_t token, uint32_t* codes, uint32_t* histogram) {
  const uint32_t code = score_code(__float_as_uint(score));
  codes[token] = code;
  atomicAdd(&histogram[first_digit(code)], 1u);
}

template <int kThreads>
__device__ void bring_scores(const float* scores, const Team& team, uint32_t* codes, uint32_t* histogram) {
  constexpr int kAhead = 4;  // loads of one thread in flight
  constexpr int kWide = 4;   // scores of a load
  // Before the first multiple of 16 bytes and after the last they come one by one.
  const int64_t before = min(int64_t((0 - reinterpret_cast<uintptr_t>(scores) / sizeof(float)) % kWide), team.tokens);
  const int64_t words = (team.tokens - before) / kWide;
  for (int64_t first = threadIdx.x; first < words; first += kThreads * kAhead) {
    const int left = clamp_to_int(words - first);
    Access<16> loaded[kAhead];
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (i * kThreads < left) {
        loaded[i] = __ldg(reinterpret_cast<const Access<16>*>(scores + before) + first + i * kThreads);
      }
    }
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (i * kThreads >= left) break;
      const Pack<float, kWide> pack = unpack<float, kWide>(loaded[i]);
      const int64_t token = before + (first + i * kThreads) * kWide;
      FSDC_UNROLL
      for (int item = 0; item < kWide; ++item) bring_code(pack.items[item], token + item, codes, histogram);
    }
  }
  for (int64_t i = threadIdx.x; i < team.tokens - words * kWide; i += kThreads) {
    const int64_t token = i < before ? i : i + words * kWide;
    bring_code(__ldg(scores + token), token, codes, histogram);
  }
}

template <class Element, int kThreads>
__device__ void bring_weight_sums(const AccumulateScoresParams& weights, int64_t batch, int64_t head, const Team& team,
                                  uint32_t* codes, uint32_t* histogram) {
  const int64_t end = team.first_token + team.tokens;
  for (int64_t first = team.first_token + threadIdx.x; first < end; first += kThreads * kTokensPerThread) {
    float sums[kTokensPerThread];
    sum_weights<Element, kThreads>(weights, batch, head, first, end, sums);
    FSDC_UNROLL
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int64_t token = first + i * kThreads;
      if (token < end) bring_code(sums[i], token - team.first_token, codes, histogram);
    }
  }
}

// Fills `codes` and `histogram`; the caller's next barrier makes them the block's. `scores` are the row's.
template <CodeSource kSource, int kThreads>
__device__ void bring_codes(const TruncateParams& params, const float* scores, int64_t batch, int64_t head,
                            const Team& team, uint32_t* codes, uint32_t* histogram) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) histogram[bin] = 0;
  __syncthreads();
  if constexpr (kSource == CodeSource::kScoresOnChip) {
    bring_scores<kThreads>(scores + team.first_token, team, codes, histogram);
  } else {
    switch_element(params.weights.dtype, [&](auto element) {
      using Element = typename decltype(element)::type;
      bring_weight_sums<Element, kThreads>(params.weights, batch, head, team, codes, histogram);
    });
  }
}

}  // namespace fsdc::cuda
