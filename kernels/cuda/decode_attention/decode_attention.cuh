// SPDX-License-Identifier: Apache-2.0
// The kernel of decode_attention.cu (see there) and how it is launched.
#pragma once

#include <limits>

#include "attend.cuh"
#include "finish.cuh"
#include "plan.h"

namespace fsdc::cuda {

constexpr int kDecodeAttentionThreads = 256;  // per block, as shipped; tests run smaller ones too

// Which row a block works on, and on which of its runs.
struct DecodePlace {
  int64_t batch, head;
  int64_t run;        // the first one that it finishes, or the one that it attends to; -1: nothing is left for it
  int64_t first_run;  // of the row, among those of all rows
};

__device__ inline DecodePlace place_of(const DecodeAttentionParams& p, const DecodeLaunch& plan) {
  if (plan.phase == DecodePhase::kWhole) {
    const int64_t row = blockIdx.x / plan.cluster;
    return {row / p.heads, row % p.heads, blockIdx.x % plan.cluster, 0};
  }
  const bool finishes = plan.phase == DecodePhase::kFinish;
  const int64_t per_batch_row = finishes ? p.heads : plan.runs_per_batch_row;
  const int64_t batch = blockIdx.x / per_batch_row;
  const int64_t wanted = blockIdx.x % per_batch_row;  // a head, or a run
  int64_t first_run = 0;
  FSDC_NO_UNROLL
  for (int64_t head = 0; head < p.heads; ++head) {
    const int64_t runs = runs_of_head(p, plan, head);
    const int64_t run = finishes ? 0 : wanted - first_run;
    if (finishes ? head == wanted : run < runs) return {batch, head, run, batch * plan.runs_per_batch_row + first_run};
    first_run += runs;
  }
  return {batch, 0, -1, 0};
}

template <class T, int kPack, int kHeads, int kThreads>
__global__ void __launch_bounds__(kThreads, 2)
    decode_attention_kernel(const DecodeAttentionParams p, const DecodeLaunch plan) {
  using A = Accumulator<T>;
  FSDC_SHARED(place, DecodePlace);
  FSDC_SHARED(row, DecodeRow<T>);
  FSDC_SHARED(news, RowNews);
  FSDC_DYNAMIC_SHARED(shared, A);
  if (threadIdx.x == 0) {
    place = place_of(p, plan);
    if (place.run >= 0) row = row_of<T>(p, place.batch, place.head);
  }
  __syncthreads();
  if (place.run < 0) return;
  const uint32_t rank = plan.phase == DecodePhase::kWhole ? static_cast<uint32_t>(place.run) : 0;
  if (!is_valid(p, row.b)) {
    if (plan.phase != DecodePhase::kAttend && rank == 0) write_zeros<kThreads>(p, row);
    return;
  }

  // Asked for now and looked at late, so that nobody waits for it.
  uint32_t found = 0;
  const bool is_leader = plan.phase != DecodePhase::kAttend && rank == 0 && threadIdx.x == 0;
  if (is_leader) found = take_position(p, plan, row.b);
  if (plan.phase != DecodePhase::kFinish) attend_run<kPack, kHeads, kThreads>(p, plan, row, place.run, shared);
  if (is_leader) news.position = put_position(p, plan, row.b, found);
  A* const scratch = static_cast<A*>(plan.scratch) + place.first_run * plan.run.numbers;  // [runs of the row]
  if (plan.phase == DecodePhase::kAttend) {
    __syncthreads();
    A* const to = scratch + place.run * plan.run.numbers;
    FSDC_NO_UNROLL
    for (int64_t i = threadIdx.x; i < plan.run.numbers; i += kThreads) to[i] = shared[plan.shared.run + i];
    return;
  }
  team_sync(plan.cluster);
  finish_row<kThreads>(p, plan, row, rank, scratch, shared, news);
}

inline bool are_aligned(const DecodeAttentionParams& params) {
  const int64_t element = element_size(params.dtype), wide = accumulator_bytes(params);
  bool are_elements = is_aligned(params.output, element);
  for (const SlotRows& rows : {params.keys, params.values}) are_elements &= is_aligned(rows.data, element);
  for (const TokenInput& token : {params.query, params.new_keys, params.new_values}) {
    are_elements &= is_aligned(token.data, element);
  }
  return are_elements && is_aligned(params.facts, 4) && is_aligned(params.positions, 4) && is_aligned(params.seen, 4) &&
         is_aligned(params.heads_layout, 4) && is_aligned(params.skipped_keys, wide) &&
         is_aligned(params.skipped_values, wide) && is_aligned(params.skipped_count, 4) && is_aligned(params.lost, 4) &&
         is_aligned(params.sinks, params.sinks == nullptr ? 1 : element_size(params.sinks_dtype));
}

// `scratch`: scratch_bytes() of device memory.
template <int kThreads>
cudaError_t launch_decode_attention_kernel(const DecodeAttentionParams& params, const DecodePlan& plan, void* scratch,
                                           cudaStream_t stream) {
  if (params.batch == 0 || params.heads == 0) return cudaSuccess;
  if (!are_aligned(params)) return cudaErrorMisalignedAddress;
  const int pack = pack_of(params);
  DecodeLaunch launched{.phase = plan.is_split ? DecodePhase::kAttend : DecodePhase::kWhole,
                        .cluster = plan.cluster,
                        .seen_shift = position_bits(params),
                        .run_tokens = plan.run_tokens,
                        .runs_per_batch_row = runs_per_batch_row(params, plan),
                        .key_lanes = lanes_of(params.keys.dim, pack),
                        .value_lanes = lanes_of(params.values.dim, pack),
                        .shared = shared_layout(params, plan, kThreads),
                        .run = run_layout(params, plan.run_tokens),
                        .scratch = scratch};
  const int64_t rows = params.batch * params.heads;
  const int64_t blocks = plan.is_split ? params.batch * launched.runs_per_batch_row : rows * plan.cluster;
  const bool fits = blocks <= std::numeric_limits<int32_t>::max() &&  // a grid
                    params.length >> launched.seen_shift == 0 &&
                    params.group * std::max(launched.shared.row_stride, params.values.dim) < int64_t{1} << 30;
  if (!fits) return cudaErrorInvalidValue;
  Grid grid{.blocks = static_cast<unsigned>(blocks),
            .threads = kThreads,
            .shared_bytes = static_cast<size_t>(shared_bytes(params, plan, kThreads)),
            .cluster = plan.cluster};
  return with_element(params.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    constexpr int kPack = 16 / sizeof(Element);
    auto* kernel = decode_attention_kernel<Element, 1, 4, kThreads>;
    if constexpr (sizeof(Element) < 8) {  // fp64 is for comparison
      if (pack == kPack) kernel = decode_attention_kernel<Element, kPack, 4, kThreads>;
      if (pack == kPack && params.group > 4) kernel = decode_attention_kernel<Element, kPack, 8, kThreads>;
    }
    const cudaError_t error = launch(kernel, grid, stream, params, launched);
    if (error != cudaSuccess || !plan.is_split) return error;
    launched.phase = DecodePhase::kFinish;
    grid.blocks = static_cast<unsigned>(rows);
    return launch(kernel, grid, stream, params, launched);
  });
}

}  // namespace fsdc::cuda
