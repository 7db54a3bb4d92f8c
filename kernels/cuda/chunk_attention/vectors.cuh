// SPDX-License-Identifier: Apache-2.0
// What chunk_attention does vector by vector around its products: queries and values in, outputs out. A warp each.
#pragma once

#include "block.cuh"

namespace fsdc::cuda {

template <int kThreads>
__device__ int64_t warp_of_grid() {
  return int64_t{blockIdx.x} * (kThreads / kWarpThreads) + warp_index();
}

// The mean or the sum of the evicted tokens of a row, and how many it counts for.
template <class Number>
struct SkippedEntry {
  int32_t count;
  Number size;
  Number part;  // of the sums that it is: 1 over its size

  __device__ SkippedEntry(const ChunkAttentionParams& params, int64_t row)
      : count(params.skipped_count == nullptr ? 0 : params.skipped_count[row]),
        size(params.skipped_mean && count > 0 ? static_cast<Number>(count) : Number{1}),
        part(1 / size) {}
};

// queries[row, lane] = the vector of a query head, contiguous. With it goes the logit of the entry.
template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    take_queries_kernel(const ChunkAttentionParams params, Element* queries, Lane<Accumulator<Element>>* lanes) {
  using Number = Accumulator<Element>;
  const int64_t at = warp_of_grid<kThreads>();
  const int64_t lanes_per_row = params.queries * params.group;
  const int64_t row = at / lanes_per_row;
  if (row >= params.batch * params.heads) return;
  const int64_t query = at % lanes_per_row / params.group;
  const int64_t head = row % params.heads * params.group + at % params.group;
  const Element* const from = static_cast<const Element*>(params.query.data) +
                              row / params.heads * params.query.batch_stride + head * params.query.head_stride +
                              query * params.query.token_stride;
  const int64_t dim = params.query.dim;
  const SkippedEntry<Number> entry(params, row);
  const Number* const key = static_cast<const Number*>(params.skipped_keys) + row * dim;
  Number product = 0;
  for (int64_t d = lane_index(); d < dim; d += kWarpThreads) {
    const Element element = from[d];
    queries[at * dim + d] = element;
    if (entry.count > 0) product += widen(element) * (key[d] * entry.part);
  }
  if (params.skipped_count == nullptr) return;
  for (unsigned distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    product += __shfl_down_sync(kWholeWarp, product, distance);
  }
  if (lane_index() != 0) return;
  const Number logit = LogitRule<Number>(params)(product) + logarithm(entry.size);
  lanes[at].entry = entry.count > 0 ? logit : minus_infinity<Number>();
}

// values[row, token] = the values of the block's rows, and zeros for tokens that are not there: whatever lies there, and
// be it NaN, is multiplied with a weight of 0.
template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    take_values_kernel(const ChunkAttentionParams params, const ChunkBlock block, Element* values) {
  const int64_t at = warp_of_grid<kThreads>();
  const int64_t tokens = block.held + params.queries;
  if (at >= block.rows * tokens) return;
  const int64_t token = at % tokens;
  const ChunkRow row(params, block.row_at(at / tokens), block.first_token);
  const bool is_there = row.positions(params)[token] >= 0;
  const Element* const from = row.vectors<Element>(params.values) + token * params.values.token_stride;
  const int64_t dim = params.values.dim;
  Element nothing;
  narrow(Accumulator<Element>{0}, nothing);
  for (int64_t d = lane_index(); d < dim; d += kWarpThreads) values[at * dim + d] = is_there ? from[d] : nothing;
}

// output = scale * sums + the entry's share of its value
template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    write_outputs_kernel(const ChunkAttentionParams params, const Accumulator<Element>* sums,
                         const Lane<Accumulator<Element>>* lanes) {
  using Number = Accumulator<Element>;
  const int64_t at = warp_of_grid<kThreads>();
  const int64_t lanes_per_row = params.queries * params.group;
  const int64_t row = at / lanes_per_row;
  if (row >= params.batch * params.heads) return;
  const int64_t query = at % lanes_per_row / params.group;
  const int64_t head = row * params.group + at % params.group;
  const int64_t dim = params.values.dim;
  const Lane<Number> lane = lanes[at];
  const SkippedEntry<Number> entry(params, row);
  const Number* const value = static_cast<const Number*>(params.skipped_values) + row * dim;
  Element* const out = static_cast<Element*>(params.output) + (head * params.queries + query) * dim;
  for (int64_t d = lane_index(); d < dim; d += kWarpThreads) {
    Number sum = lane.scale == 0 ? Number{0} : lane.scale * sums[at * dim + d];
    if (entry.count > 0) sum += lane.entry * (value[d] * entry.part);
    narrow(sum, out[d]);
  }
}

}  // namespace fsdc::cuda
