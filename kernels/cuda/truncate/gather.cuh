// SPDX-License-Identifier: Apache-2.0
// Copy the kept tokens of one row, keys and values in one go. Bytes only: no element type is known here.
#pragma once

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/truncate.h"

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

// Words of a token, counted through its key and on through its value, as a thread walks them in steps of kThreads: no
// division on the way, and few registers, of which the loads want most.
struct Place {
  uint32_t rank;  // fewer than 2^31 tokens stay
  uint32_t word;

  __device__ void advance(uint32_t ranks, uint32_t words, uint32_t width) {
    rank += ranks;
    word += words;
    if (word >= width) {
      word -= width;
      ++rank;
    }
  }
};

// out[rank] = source[indices[rank]] for the ranks in [first_rank, end_rank).
template <class Word, int kThreads>
__device__ void gather_words(const RowCopy& keys, const RowCopy& values, const int64_t* indices, int64_t first_rank,
                             int64_t end_rank) {
  constexpr int kAhead = 4;  // loads of one thread in flight: 32 KB for 512 threads and 16-byte words
  constexpr uint32_t kBytes = sizeof(Word);
  const uint32_t of_key = static_cast<uint32_t>(keys.token_bytes) / kBytes;
  const uint32_t width = of_key + static_cast<uint32_t>(values.token_bytes) / kBytes;
  if (width == 0) return;
  const uint32_t step_ranks = kThreads / width;
  const uint32_t step_words = kThreads % width;
  const uint32_t end = static_cast<uint32_t>(end_rank);
  Place place{static_cast<uint32_t>(first_rank) + threadIdx.x / width, threadIdx.x % width};

  while (place.rank < end) {
    Place ahead = place;
    Word loaded[kAhead];
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (ahead.rank < end) {
        const bool is_key = ahead.word < of_key;
        const char* const source = is_key ? keys.source : values.source;
        const int64_t step = is_key ? keys.source_step : values.source_step;
        const uint32_t word = is_key ? ahead.word : ahead.word - of_key;
        loaded[i] = __ldg(reinterpret_cast<const Word*>(source + indices[ahead.rank] * step) + word);
      }
      ahead.advance(step_ranks, step_words, width);
    }
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (place.rank < end) {
        const bool is_key = place.word < of_key;
        char* const out = is_key ? keys.out : values.out;
        const uint32_t words = is_key ? of_key : width - of_key;
        const uint32_t word = is_key ? place.word : place.word - of_key;
        __stcs(reinterpret_cast<Word*>(out) + (uint64_t{place.rank} * words + word),
               loaded[i]);  // nobody reads it soon
      }
      place.advance(step_ranks, step_words, width);
    }
  }
}

template <int kThreads>
__device__ void gather_tokens(const RowCopy& keys, const RowCopy& values, int access, const int64_t* indices,
                              int64_t first_rank, int64_t end_rank) {
  switch (access) {
    case 16:
      return gather_words<Access<16>, kThreads>(keys, values, indices, first_rank, end_rank);
    case 8:
      return gather_words<Access<8>, kThreads>(keys, values, indices, first_rank, end_rank);
    case 4:
      return gather_words<Access<4>, kThreads>(keys, values, indices, first_rank, end_rank);
    default:
      return gather_words<Access<2>, kThreads>(keys, values, indices, first_rank, end_rank);
  }
}

}  // namespace fsdc::cuda
