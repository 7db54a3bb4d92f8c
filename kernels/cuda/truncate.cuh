// SPDX-License-Identifier: Apache-2.0
// The kernel of truncate.cu (see there) and how it is launched.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "truncate_gather.cuh"
#include "truncate_select.cuh"
#include "truncate_skipped.cuh"

namespace fsdc::cuda {

// What the host decides about a launch.
struct TruncatePlan {
  uint32_t shares;  // blocks per row
  int64_t ranks;    // of the kept tokens, per share
  int element_bytes;
  int key_access;  // bytes per load and store: 16, 8, 4 or 2
  int value_access;
};

// Element: what the skipped tokens are summed from; void without such an entry, then only bytes move. Two
// blocks per multiprocessor, so that one selects while the other copies; the sum wants the registers of both.
template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads, std::is_void_v<Element> ? 2 : 1)
    truncate_kernel(const TruncateParams params, const TruncatePlan plan) {
  const uint32_t row = blockIdx.x / plan.shares;
  const uint32_t share = blockIdx.x % plan.shares;
  const int64_t batch = row / static_cast<uint32_t>(params.heads);
  const int64_t head = row % static_cast<uint32_t>(params.heads);
  const int64_t entries = params.kept + (params.has_skipped ? 1 : 0);
  const int64_t first_rank = min(share * plan.ranks, params.kept);
  const int64_t end_rank = min(first_rank + plan.ranks, params.kept);
  const float* const scores =  // [S]
      params.scores + batch * params.score_batch_stride + head * params.score_head_stride;
  int64_t* const indices = params.indices + row * entries;  // [E]

  const Boundary boundary = select_tokens<kThreads>(scores, params.tokens, params.kept, first_rank, end_rank, indices);

  const RowCopy keys = row_of(params.keys, batch, head, row, entries, plan.element_bytes);
  const RowCopy values = row_of(params.values, batch, head, row, entries, plan.element_bytes);
  gather_tokens<kThreads>(keys, plan.key_access, indices, first_rank, end_rank);
  gather_tokens<kThreads>(values, plan.value_access, indices, first_rank, end_rank);

  if constexpr (!std::is_void_v<Element>) {
    if (share == 0 && threadIdx.x == 0) indices[params.kept] = -1;
    constexpr int kPack = 8 / static_cast<int>(sizeof(Element));
    if (plan.key_access >= 8 && plan.value_access >= 8) {
      sum_skipped<Element, kPack, kThreads>(scores, params.tokens, boundary, keys, values, params.kept, share,
                                            plan.shares);
    } else {
      sum_skipped<Element, 1, kThreads>(scores, params.tokens, boundary, keys, values, params.kept, share, plan.shares);
    }
  }
}

inline int access_of(const TokenRows& rows, int64_t element_bytes) {
  const int64_t strides = rows.batch_stride | rows.head_stride | rows.token_stride | rows.head_dim;
  return access_bytes(reinterpret_cast<uintptr_t>(rows.source) | reinterpret_cast<uintptr_t>(rows.out) |
                      static_cast<uint64_t>(strides * element_bytes));
}

// About 128 rows fill the device. Where there are fewer, the copying (and summing) of a row is cut into
// shares, a block each, and every share selects for itself: that uses idle multiprocessors, not time, and it
// spares scratch memory, a barrier between blocks and a second launch.
inline TruncatePlan plan_truncate(const TruncateParams& params) {
  constexpr int64_t kBlocks = 128;
  constexpr int64_t kShareBytes = 32 << 10;  // below this a share is not worth its selection
  const int64_t element_bytes = element_size(params.dtype);
  const int64_t read_tokens = params.has_skipped ? params.tokens : params.kept;
  const int64_t read_bytes = read_tokens * (params.keys.head_dim + params.values.head_dim) * element_bytes;
  const int64_t shares = std::max<int64_t>(std::min(kBlocks / params.rows(), read_bytes / kShareBytes), 1);
  return {.shares = static_cast<uint32_t>(shares),
          .ranks = (params.kept + shares - 1) / shares,
          .element_bytes = static_cast<int>(element_bytes),
          .key_access = access_of(params.keys, element_bytes),
          .value_access = access_of(params.values, element_bytes)};
}

template <int kThreads>
cudaError_t launch_truncate_kernel(const TruncateParams& params, cudaStream_t stream) {
  if (params.rows() == 0 || params.entries() == 0) return cudaSuccess;
  const TruncatePlan plan = plan_truncate(params);
  const int64_t blocks = params.rows() * plan.shares;
  const int64_t token_bytes = std::max(params.keys.head_dim, params.values.head_dim) * plan.element_bytes;
  const bool fits = blocks <= std::numeric_limits<int32_t>::max() &&          // a grid
                    params.tokens <= std::numeric_limits<uint32_t>::max() &&  // a counter
                    token_bytes < int64_t{1} << 31;                           // an offset inside a token
  if (!fits) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (!params.has_skipped) {
    return launch(truncate_kernel<void, kThreads>, grid, kThreads, 0, stream, params, plan);
  }
  return with_element(params.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    return launch(truncate_kernel<Element, kThreads>, grid, kThreads, 0, stream, params, plan);
  });
}

}  // namespace fsdc::cuda
