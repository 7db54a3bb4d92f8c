// SPDX-License-Identifier: Apache-2.0
// From logits to what values are summed with, and on the way the votes: sums over lanes, token by token.
//
// A thread has two tokens and every kWarps-th lane, so that neighbours read neighbours, nothing is added by two threads,
// and no partial sum leaves the block.
#pragma once

#include <type_traits>

#include "block.cuh"

namespace fsdc::cuda {

constexpr int kTokensOfThread = 2;
constexpr int kTokensOfBlock = kTokensOfThread * kWarpThreads;

// What the threads of a block have found for each of its tokens, one after another in the order of warps.
template <class Number, int kThreads>
struct TokenSums {
  Number of[kThreads / kWarpThreads][kTokensOfBlock];
};

// Exponentials of a block's logits, and its votes into the scores. `voted` is how many tokens scores are carried for:
// in a row's first block all, in others those that the block sees.
template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads) vote_kernel(const ChunkAttentionParams params, const ChunkBlock block,
                                                        const Lane<Accumulator<Element>>* lanes, int64_t voted) {
  using Number = Accumulator<Element>;
  using Products = Pack<Number, kTokensOfThread>;
  using Word = Access<kTokensOfThread* static_cast<int>(sizeof(Number))>;
  constexpr int kWarps = kThreads / kWarpThreads;
  constexpr int kAhead = 4;  // loads of one thread in flight
  FSDC_SHARED(votes, TokenSums<Number, kThreads>);
  const int64_t tiles = (voted + kTokensOfBlock - 1) / kTokensOfBlock;
  const int64_t place = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kTokensOfBlock + lane_index() * kTokensOfThread;
  const int64_t row_index = block.row_at(place);
  const ChunkRow row(params, row_index, block.first_token);
  const Sight sight(params, row, block.held);
  const LogitRule<Number> rule(params);
  const int lanes_of_block = static_cast<int>(block.queries * params.group);
  lanes += (row_index * params.queries + block.first_query) * params.group;

  int first_lane[kTokensOfThread];
  Number sums[kTokensOfThread] = {};
  FSDC_UNROLL
  for (int i = 0; i < kTokensOfThread; ++i) first_lane[i] = sight.first_lane(block, params.group, first + i);
  const int64_t at = place * lanes_of_block * block.stride + first;
  const Number* const products = static_cast<const Number*>(block.logits) + at;
  Element* const weights = static_cast<Element*>(block.weights) + at;
  const int end = first < block.tokens ? lanes_of_block : 0;
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
      const Lane<Number> of_lane = lanes[lane];
      const Products pack = unpack<Number, kTokensOfThread>(words[i]);
      Pack<Element, kTokensOfThread> out;
      FSDC_UNROLL
      for (int token = 0; token < kTokensOfThread; ++token) {
        bool is_seen = lane >= first_lane[token];
        if (is_seen && sight.sees != nullptr) {
          is_seen = sight.is_seen(block.first_query + lane / static_cast<int>(params.group), first + token);
        }
        const Number weight = is_seen ? exponential(rule(pack.items[token]) - of_lane.from) : Number{0};
        narrow(weight, out.items[token]);
        if (of_lane.vote != 0) sums[token] += of_lane.vote * weight;
      }
      const auto word = pack_up(out);
      *reinterpret_cast<std::remove_const_t<decltype(word)>*>(weights + lane * block.stride) = word;
    }
  }
  if (params.facts == nullptr) return;

  FSDC_UNROLL
  for (int i = 0; i < kTokensOfThread; ++i) votes.of[warp_index()][lane_index() * kTokensOfThread + i] = sums[i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTokensOfBlock; i += kThreads) {
    const int64_t token = blockIdx.x % tiles * kTokensOfBlock + i;
    if (token >= voted) break;
    Number sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += votes.of[warp][i];
    float& score = row.facts(params, kScorePlane)[token];
    const bool is_first = block.first_query == 0;
    const float carry = is_first && params.carry != nullptr ? params.carry[row.batch * params.carry_stride] : 1;
    if (is_finite(score)) score = carry * score + to_float(sum);
  }
}

// lost[row] = the mean share of its voting lanes' attention that the entry received, summed in fp64.
template <class Number, int kThreads>
__global__ void __launch_bounds__(kThreads) lost_kernel(const ChunkAttentionParams params, const Lane<Number>* lanes) {
  FSDC_SHARED(shares, double[kThreads]);
  FSDC_SHARED(counts, int64_t[kThreads]);
  const ChunkRow row(params, blockIdx.x, 0);
  const int64_t lanes_per_row = params.queries * params.group;
  double share = 0;
  int64_t count = 0;
  for (int64_t lane = threadIdx.x; lane < lanes_per_row; lane += kThreads) {
    if (row.query_weight(params, lane / params.group) == 0) continue;
    share += lanes[blockIdx.x * lanes_per_row + lane].entry;
    ++count;
  }
  shares[threadIdx.x] = share;
  counts[threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int thread = 1; thread < kThreads; ++thread) {
    share += shares[thread];
    count += counts[thread];
  }
  params.lost[blockIdx.x] = to_float(share / static_cast<double>(max(count, int64_t{1})));
}

}  // namespace fsdc::cuda
