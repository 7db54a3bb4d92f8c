// SPDX-License-Identifier: Apache-2.0
// How the blocks of a launch of truncate share the work, decided by shapes and by what the device has.
#pragma once

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/truncate.h"

namespace fsdc::cuda {

struct TruncatePlan {
  uint32_t cluster = 1;           // blocks that select a row together, each some of its tokens: 1, 2, 4 or 8
  uint32_t clusters_per_row = 1;  // each selects for itself, then they share the copying
  bool codes_on_chip = false;     // in shared memory, read once; else the scores are read again in each pass

  uint32_t blocks_per_row() const { return cluster * clusters_per_row; }
};

// The tokens of one block: whole segments of the skipped sum, so that each is added up in one place.
FSDC_HOST_DEVICE inline int64_t tokens_per_segment(int64_t tokens) {
  return (tokens + kSumSegments - 1) / kSumSegments;
}
FSDC_HOST_DEVICE inline int64_t tokens_per_block(int64_t tokens, uint32_t cluster) {
  return cluster == 1 ? tokens : tokens_per_segment(tokens) * (kSumSegments / cluster);
}

// Bytes of dynamic shared memory.
inline int64_t code_bytes(const TruncateParams& params, const TruncatePlan& plan) {
  return plan.codes_on_chip ? std::max<int64_t>(tokens_per_block(params.tokens, plan.cluster), 1) * 4 : 0;
}

// Where rows are fewer than multiprocessors, several blocks share one; with clusters they share the selection too.
// Without, every block selects the whole row for itself: that uses idle multiprocessors, not time. A row too long for
// the shared memory of one block gets a cluster as well. Where weights can be summed on the way in, a row has one
// cluster, so that each weight is read once.
inline TruncatePlan plan_truncate(const TruncateParams& params, const Device& device) {
  constexpr int64_t kStaticBytes = 28 << 10;  // of the kernel, rounded up, and what the system takes
  constexpr int64_t kShareBytes = 32 << 10;   // below this a share of the bytes is not worth a block
  constexpr uint32_t kMostInCluster = 8;

  const int64_t read_tokens = params.has_skipped ? params.tokens : params.kept;
  const int64_t token_bytes = (params.keys.head_dim + params.values.head_dim) * element_size(params.dtype);
  const bool has_weights = params.scores == nullptr;
  const int64_t weight_bytes =
      has_weights ? params.weights.group * params.weights.queries * params.tokens * element_size(params.weights.dtype)
                  : 0;
  const int64_t row_bytes = read_tokens * token_bytes + weight_bytes;
  const int64_t idle = device.multiprocessors / std::max<int64_t>(params.rows(), 1);
  const int64_t blocks = std::max<int64_t>(std::min(idle, row_bytes / kShareBytes), 1);
  const auto fits = [&](uint32_t cluster, int64_t shared_bytes) {
    return tokens_per_block(params.tokens, cluster) * 4 <= shared_bytes - kStaticBytes;
  };

  TruncatePlan plan;
  const int64_t two_blocks = std::min(device.shared_bytes_per_block, device.shared_bytes_per_multiprocessor / 2);
  while (plan.cluster * 2 <= std::min(device.largest_cluster, kMostInCluster) &&
         (plan.cluster * 2 <= blocks || !fits(plan.cluster, two_blocks))) {
    plan.cluster *= 2;
  }
  plan.codes_on_chip = fits(plan.cluster, device.shared_bytes_per_block);
  if (!has_weights || !plan.codes_on_chip) {
    plan.clusters_per_row = static_cast<uint32_t>(std::max<int64_t>(blocks / plan.cluster, 1));
  }
  return plan;
}

// Weights are summed on the way in where each is then read once: with one cluster per row, and codes that stay on chip.
// Rows too long for that take two launches: read again in each pass, the sums would be made up to five times. Few rows
// with many queries leave multiprocessors idle, before sm_90 most of them; two launches may be faster there, which
// nobody has measured.
inline bool can_sum_weights(const TruncatePlan& plan) { return plan.codes_on_chip && plan.clusters_per_row == 1; }

}  // namespace fsdc::cuda
