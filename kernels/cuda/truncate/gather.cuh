// SPDX-License-Identifier: Apache-2.0
// Copy the kept tokens of one row. Bytes only: no element type is known here.
#pragma once

#include "../../truncate.h"
#include "../block.cuh"
#include "../element.cuh"

namespace fsdc::cuda {

// The keys or the values of one (batch, head) row.
struct RowCopy {
  const char* source;   // [S, D]
  int64_t source_step;  // bytes from token to token; may be 0
  char* out;            // [E, D] contiguous
  int64_t token_bytes;  // D elements, below 2^31
};

__device__ inline RowCopy row_of(const TokenRows& rows, int64_t batch, int64_t head, int64_t row, int64_t entries,
                                 int64_t element_bytes) {
  const int64_t token_bytes = rows.head_dim * element_bytes;
  const int64_t offset = (batch * rows.batch_stride + head * rows.head_stride) * element_bytes;
  return {static_cast<const char*>(rows.source) + offset, rows.token_stride * element_bytes,
          static_cast<char*>(rows.out) + row * entries * token_bytes, token_bytes};
}

// out[rank] = source[indices[rank]] for the ranks in [first_rank, end_rank).
template <class Word, int kThreads>
__device__ void gather_words(const RowCopy& copy, const int64_t* indices, int64_t first_rank, int64_t end_rank) {
  constexpr int kAhead = 4;  // loads of one thread in flight: 32 KB for 512 threads and 16-byte words
  const uint32_t width = static_cast<uint32_t>(copy.token_bytes) / sizeof(Word);
  if (width == 0) return;
  const int64_t words = (end_rank - first_rank) * width;
  const uint32_t step_ranks = kThreads / width;  // how far kThreads words lead: no division in the loop
  const uint32_t step_words = kThreads % width;
  const int64_t* index = indices + first_rank + threadIdx.x / width;
  uint32_t column = threadIdx.x % width;

  for (int64_t first = threadIdx.x; first < words; first += kThreads * kAhead) {
    const int left = clamp_to_int(words - first);
    Word loaded[kAhead];
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (i * kThreads < left) {
        const char* const token = copy.source + *index * copy.source_step;
        loaded[i] = __ldg(reinterpret_cast<const Word*>(token) + column);
      }
      index += step_ranks;
      column += step_words;
      if (column >= width) {
        column -= width;
        ++index;
      }
    }
    Word* const out = reinterpret_cast<Word*>(copy.out) + first_rank * width + first;
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (i * kThreads < left) out[i * kThreads] = loaded[i];
    }
  }
}

template <int kThreads>
__device__ void gather_tokens(const RowCopy& copy, int access, const int64_t* indices, int64_t first_rank,
                              int64_t end_rank) {
  switch (access) {
    case 16:
      return gather_words<Access<16>, kThreads>(copy, indices, first_rank, end_rank);
    case 8:
      return gather_words<Access<8>, kThreads>(copy, indices, first_rank, end_rank);
    case 4:
      return gather_words<Access<4>, kThreads>(copy, indices, first_rank, end_rank);
    default:
      return gather_words<Access<2>, kThreads>(copy, indices, first_rank, end_rank);
  }
}

}  // namespace fsdc::cuda
