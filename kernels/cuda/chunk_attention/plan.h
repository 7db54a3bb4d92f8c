// SPDX-License-Identifier: Apache-2.0
// How chunk_attention is cut into blocks: by shapes alone, so that the order of its sums is always the same.
#pragma once

#include <algorithm>

#include "kernels/chunk_attention.h"

namespace fsdc::cuda {

// What a block has at most. 2^23 logits are 32 MB in fp32, with the exponentials of 16 bits 48: about the second-level
// cache of an H100, from which the kernels read again what a product has just written. Fewer queries see less of what is
// yet to come and fill a product badly.
struct ChunkLimits {
  int64_t queries = 128;
  int64_t logits = int64_t{1} << 23;
};

struct ChunkPlan {
  int64_t rows;     // of a block: (batch, KV head) pairs, or batch rows where heads are taken one by one
  int64_t queries;  // of a block

  // For rows of `lanes_per_query` lanes and `tokens` tokens.
  ChunkPlan(int64_t all_rows, int64_t all_queries, int64_t lanes_per_query, int64_t tokens, const ChunkLimits& limits) {
    const int64_t of_query = std::max<int64_t>(lanes_per_query * tokens, 1);
    queries = std::clamp<int64_t>(limits.logits / of_query, 1, std::min(limits.queries, all_queries));
    rows = std::clamp<int64_t>(limits.logits / (of_query * queries), 1, std::max<int64_t>(all_rows, 1));
  }
};

// Whether the rows (b, h) of a tensor lie at equal distances.
inline bool are_rows_even(const ChunkAttentionParams& params, int64_t batch_stride, int64_t head_stride) {
  return params.batch == 1 || params.heads == 1 || batch_stride == params.heads * head_stride;
}

// Whether each KV head is taken by itself, for all batch rows: heads that hold different numbers of tokens, or rows that
// one product cannot walk through.
inline bool takes_heads_alone(const ChunkAttentionParams& params) {
  const auto uneven = [&](const TokenVectors& vectors) {
    return !are_rows_even(params, vectors.batch_stride, vectors.head_stride);
  };
  return params.head_layout != nullptr || uneven(params.keys) || uneven(params.values);
}

}  // namespace fsdc::cuda
