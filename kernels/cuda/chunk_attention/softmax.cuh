// SPDX-License-Identifier: Apache-2.0
// The softmax of each lane in one reading of its logits: the largest, and the sum of exponentials below it.
#pragma once

#include "block.cuh"

namespace fsdc::cuda {

// Of some logits. They may all be -inf, which is the largest then; a NaN among them makes the sum NaN.
template <class Number>
struct Exponentials {
  Number largest;
  Number sum;

  __device__ static Exponentials of_none() { return {minus_infinity<Number>(), 0}; }

  // What is subtracted: never -inf, of which -inf minus itself is NaN.
  __device__ static Number from(Number largest) { return largest == minus_infinity<Number>() ? Number{0} : largest; }

  template <int kCount>
  __device__ void add(const Number (&logits)[kCount]) {
    Number raised = largest;
    FSDC_UNROLL
    for (int i = 0; i < kCount; ++i) raised = max(raised, logits[i]);
    sum *= exponential(largest - from(raised));
    FSDC_UNROLL
    for (int i = 0; i < kCount; ++i) sum += exponential(logits[i] - from(raised));
    largest = raised;
  }
  __device__ void merge(const Exponentials& other) {
    const Number raised = max(largest, other.largest);
    sum = sum * exponential(largest - from(raised)) + other.sum * exponential(other.largest - from(raised));
    largest = raised;
  }
};

// The sum of the block's threads, good in thread 0. One barrier; `slots` is shared memory, one per warp.
template <int kThreads, class Number>
__device__ Exponentials<Number> sum_over_block(Exponentials<Number> mine, Exponentials<Number>* slots) {
  for (unsigned distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    const Number largest = __shfl_down_sync(kWholeWarp, mine.largest, distance);
    const Number sum = __shfl_down_sync(kWholeWarp, mine.sum, distance);
    mine.merge({largest, sum});
  }
  if (lane_index() == 0) slots[warp_index()] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarpThreads; ++warp) mine.merge(slots[warp]);
  }
  return mine;
}

template <class Number>
__device__ Number sink_logit(const ChunkAttentionParams& params, int64_t head) {
  Number logit = minus_infinity<Number>();
  if (params.sinks == nullptr) return logit;
  switch_element(params.sinks_dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    logit = static_cast<Number>(widen(static_cast<const Element*>(params.sinks)[head]));
  });
  return logit;
}

// Completes the lanes of a block, a thread block each.
template <class Number, int kThreads>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const ChunkAttentionParams params, const ChunkBlock block, Lane<Number>* lanes) {
  constexpr int kPack = 16 / static_cast<int>(sizeof(Number));
  constexpr int kAhead = kPack / 2;  // loads of one thread in flight
  FSDC_SHARED(slots, Exponentials<Number>[kThreads / kWarpThreads]);
  const int64_t lanes_of_block = block.queries * params.group;
  const int64_t place = blockIdx.x / lanes_of_block;
  const int64_t lane = blockIdx.x % lanes_of_block;
  const int64_t query = block.first_query + lane / params.group;
  const int64_t row_index = block.row_at(place);
  const ChunkRow row(params, row_index, block.first_token);
  const Sight sight(params, row, block.held);
  const LogitRule<Number> rule(params);
  const Number* const products = static_cast<const Number*>(block.logits) + int64_t{blockIdx.x} * block.stride;

  auto seen = Exponentials<Number>::of_none();
  for (int64_t first = int64_t{threadIdx.x} * kPack; first < block.tokens; first += kThreads * kPack * kAhead) {
    Access<16> words[kAhead];
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int64_t token = first + i * kThreads * kPack;
      if (token < block.tokens) words[i] = *reinterpret_cast<const Access<16>*>(products + token);
    }
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int64_t token = first + i * kThreads * kPack;
      if (token >= block.tokens) break;
      const Pack<Number, kPack> pack = unpack<Number, kPack>(words[i]);
      Number logits[kPack];
      FSDC_UNROLL
      for (int item = 0; item < kPack; ++item) {
        const int64_t j = token + item;
        const bool sees = j < block.tokens && sight.is_there(j) && sight.is_seen(query, j);
        logits[item] = sees ? rule(pack.items[item]) : minus_infinity<Number>();
      }
      seen.add(logits);
    }
  }
  seen = sum_over_block<kThreads>(seen, slots);
  if (threadIdx.x != 0) return;

  Lane<Number>& found = lanes[(row_index * params.queries + block.first_query) * params.group + lane];
  const Number sink = sink_logit<Number>(params, row.head * params.group + lane % params.group);
  const Number entry = params.skipped_count == nullptr ? minus_infinity<Number>() : found.entry;
  const bool sees_none = seen.largest == minus_infinity<Number>();
  const Number from = sees_none ? Number{0} : max(seen.largest, max(sink, entry));
  const Number sum = seen.sum * exponential(Exponentials<Number>::from(seen.largest) - from);
  const Number share = exponential(entry - from);
  const Number scale = sees_none && sum == 0 ? Number{0} : 1 / (sum + exponential(sink - from) + share);
  const float weight = row.query_weight(params, query);
  found = {from, scale, weight == 0 ? Number{0} : weight * scale, scale == 0 ? Number{0} : share * scale};
}

}  // namespace fsdc::cuda
