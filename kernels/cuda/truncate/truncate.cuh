// SPDX-License-Identifier: Apache-2.0
// The kernel of truncate.cu (see there) and how it is launched.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "gather.cuh"
#include "plan.h"
#include "select.cuh"
#include "skipped.cuh"

namespace fsdc::cuda {

// The plan, and what follows from it.
struct TruncateLaunch {
  uint32_t cluster;
  uint32_t clusters_per_row;
  int64_t ranks_per_block;  // of the kept tokens
  int element_bytes;
  int access;  // bytes per load and store of keys and values: 16, 8, 4 or 2
};

struct Ranks {
  int64_t begin;
  int64_t end;
};

__device__ inline Ranks ranks_from(int64_t begin, int64_t count, int64_t kept) {
  return {min(begin, kept), min(begin + count, kept)};
}

// Selects with the blocks of the cluster, and writes the indices that its blocks copy. Where all stay, or none, there
// is nothing to compare.
template <int kThreads, class Codes>
__device__ Boundary select_tokens(const Codes& codes, const Team& team, const TruncateParams& params,
                                  uint32_t* histogram, const Ranks& of_cluster, const Ranks& of_block,
                                  int64_t* indices) {
  if (params.kept == 0) {
    __syncthreads();  // codes may just have been brought
    return {~0u, 0, params.tokens};
  }
  if (params.kept == params.tokens) {
    for (int64_t rank = of_block.begin + threadIdx.x; rank < of_block.end; rank += kThreads) indices[rank] = rank;
    __syncthreads();
    return {0, 0, 0};
  }
  const Threshold threshold = find_threshold<kThreads>(codes, team, static_cast<uint32_t>(params.kept), histogram);
  return write_indices<kThreads>(codes, team, threshold, of_cluster.begin, of_cluster.end, indices);
}

// Two blocks per multiprocessor, so that one selects while the other copies; sums want the registers of both.
template <bool kHasSkipped, CodeSource kSource>
constexpr int kBlocksPerMultiprocessor = kHasSkipped || kSource == CodeSource::kWeightSumsOnChip ? 1 : 2;

// Element types are told apart inside, where sums are made: what is copied is bytes.
template <bool kHasSkipped, CodeSource kSource, int kThreads>
__global__ void __launch_bounds__(kThreads, (kBlocksPerMultiprocessor<kHasSkipped, kSource>))
    truncate_kernel(const TruncateParams params, const TruncateLaunch plan) {
  FSDC_SHARED(histogram, uint32_t[kBins]);
  const uint32_t blocks_per_row = plan.cluster * plan.clusters_per_row;
  const uint32_t row = blockIdx.x / blocks_per_row;
  const uint32_t block = blockIdx.x % blocks_per_row;  // of this row
  const uint32_t cluster = block / plan.cluster;
  const int64_t batch = row / static_cast<uint32_t>(params.heads);
  const int64_t head = row % static_cast<uint32_t>(params.heads);
  const int64_t entries = params.kept + (kHasSkipped ? 1 : 0);
  const float* const scores =  // [S]
      kSource == CodeSource::kWeightSumsOnChip
          ? nullptr
          : params.scores + batch * params.score_batch_stride + head * params.score_head_stride;
  int64_t* const indices = params.indices + row * entries;  // [E]
  const Team team = team_of(params.tokens, plan.cluster);

  const auto codes_of_block = [&] {
    if constexpr (kSource != CodeSource::kScoresStreamed) {
      FSDC_DYNAMIC_SHARED(codes, uint32_t);
      const bool all_stay = params.kept == params.tokens;
      if (!all_stay) bring_codes<kSource, kThreads>(params, scores, batch, head, team, codes, histogram);
      return CodesOnChip{codes};
    } else {
      return StreamedCodes{scores + team.first_token};
    }
  }();
  const int64_t ranks_per_cluster = plan.ranks_per_block * plan.cluster;
  const Ranks of_cluster = ranks_from(cluster * ranks_per_cluster, ranks_per_cluster, params.kept);
  const Ranks of_block = ranks_from(block * plan.ranks_per_block, plan.ranks_per_block, params.kept);
  const Boundary boundary =
      select_tokens<kThreads>(codes_of_block, team, params, histogram, of_cluster, of_block, indices);

  const RowCopy keys = row_of(params.keys, batch, head, row, entries, plan.element_bytes);
  const RowCopy values = row_of(params.values, batch, head, row, entries, plan.element_bytes);
  gather_tokens<kThreads>(keys, values, plan.access, indices, of_block.begin, of_block.end);
  if constexpr (kHasSkipped) {
    if (block == 0 && threadIdx.x == 0) indices[params.kept] = -1;
    sum_skipped_tokens<kThreads>(codes_of_block, team, params, boundary, keys, values, plan.access, cluster,
                                 plan.clusters_per_row);
  }
}

inline int access_of(const TokenRows& rows, int64_t element_bytes) {
  const int64_t strides = rows.batch_stride | rows.head_stride | rows.token_stride | rows.head_dim;
  return access_bytes(reinterpret_cast<uintptr_t>(rows.source) | reinterpret_cast<uintptr_t>(rows.out) |
                      static_cast<uint64_t>(strides * element_bytes));
}

// Of whatever is read or written; keys and values are aligned where their access is as wide as an element.
inline bool are_aligned(const TruncateParams& params, int access) {
  const bool scores = params.scores != nullptr ? is_aligned(params.scores, sizeof(float))
                                               : is_aligned(params.weights.weights, element_size(params.weights.dtype));
  return scores && access >= element_size(params.dtype) && is_aligned(params.indices, sizeof(int64_t));
}

constexpr int kTruncateThreads = 512;  // per block, as shipped; tests run smaller ones too

template <int kThreads>
cudaError_t launch_truncate_kernel(const TruncateParams& params, const TruncatePlan& plan, cudaStream_t stream) {
  if (params.rows() == 0 || params.entries() == 0) return cudaSuccess;
  if (params.scores == nullptr && !can_sum_weights(plan)) return cudaErrorInvalidValue;
  const int64_t element_bytes = element_size(params.dtype);
  const int64_t blocks = params.rows() * plan.blocks_per_row();
  const int64_t token_bytes = std::max(params.keys.head_dim, params.values.head_dim) * element_bytes;
  const bool fits = blocks <= std::numeric_limits<int32_t>::max() &&         // a grid
                    params.tokens <= std::numeric_limits<int32_t>::max() &&  // a counter, and a step beyond
                    token_bytes < int64_t{1} << 31;                          // an offset inside a token
  if (!fits) return cudaErrorInvalidValue;
  const TruncateLaunch launched{
      .cluster = plan.cluster,
      .clusters_per_row = plan.clusters_per_row,
      .ranks_per_block = (params.kept + plan.blocks_per_row() - 1) / plan.blocks_per_row(),
      .element_bytes = static_cast<int>(element_bytes),
      .access = std::min(access_of(params.keys, element_bytes), access_of(params.values, element_bytes))};
  if (!are_aligned(params, launched.access)) return cudaErrorMisalignedAddress;
  const Grid grid{.blocks = static_cast<unsigned>(blocks),
                  .threads = kThreads,
                  .shared_bytes = static_cast<size_t>(code_bytes(params, plan)),
                  .cluster = plan.cluster};
  const auto launch_for = [&](auto has_skipped) {
    constexpr bool kHasSkipped = decltype(has_skipped)::value;
    auto* kernel = truncate_kernel<kHasSkipped, CodeSource::kScoresStreamed, kThreads>;
    if (plan.codes_on_chip) kernel = truncate_kernel<kHasSkipped, CodeSource::kScoresOnChip, kThreads>;
    if (params.scores == nullptr) kernel = truncate_kernel<kHasSkipped, CodeSource::kWeightSumsOnChip, kThreads>;
    return launch(kernel, grid, stream, params, launched);
  };
  return params.has_skipped ? launch_for(std::true_type{}) : launch_for(std::false_type{});
}

}  // namespace fsdc::cuda
