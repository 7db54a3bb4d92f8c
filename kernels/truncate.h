// SPDX-License-Identifier: Apache-2.0
// truncate: keep the `kept` best-scored tokens of each row, in ascending token order.
//
// Which   the larger score_code stays (score_order.h); of equal codes the newer token, that is the larger index.
// Skipped with `has_skipped` one more entry follows: the sum of the tokens that were not kept, and index -1. The
//         tokens are cut into kSumSegments runs of ceil(S / kSumSegments); each run is summed in ascending order,
//         then the runs' sums are added in ascending order, all starting from +0, in fp32 (fp64 for fp64), rounded
//         once to the element type. So every implementation, however it splits the work, gives the same bits (of a NaN
//         only that it is one: its payload is the hardware's).
#pragma once

#include "accumulate_scores.h"
#include "types.h"

namespace fsdc {

constexpr int64_t kSumSegments = 16;

// The keys or the values: where rows come from and where they go.
struct TokenRows {
  const void* source;    // [B, H, S, D], last dimension contiguous
  int64_t batch_stride;  // any stride may be 0
  int64_t head_stride;
  int64_t token_stride;
  int64_t head_dim;  // D; keys and values may differ
  void* out;         // [B, H, E, D] contiguous, E = kept + has_skipped
};

struct TruncateParams {
  int64_t batch;        // B
  int64_t heads;        // H
  int64_t tokens;       // S
  int64_t kept;         // tokens kept per row, at most S
  bool has_skipped;     // the entry of the skipped tokens follows the kept ones
  DType dtype;          // of keys and values
  const float* scores;  // [B, H, S], last dimension contiguous. CUDA: null for the sums of `weights`
  int64_t score_batch_stride;
  int64_t score_head_stride;
  TokenRows keys;
  TokenRows values;
  int64_t* indices;  // [B, H, E] contiguous

  // Attention weights that a CUDA kernel sums on its way in, as accumulate_scores.h prescribes with `overwrite`; its
  // own `scores` and `carry` are not used. Whether it can: truncate_sums_weights (cuda/launch.h).
  AccumulateScoresParams weights = {};

  int64_t rows() const { return batch * heads; }
  int64_t entries() const { return kept + (has_skipped ? 1 : 0); }
};

}  // namespace fsdc
