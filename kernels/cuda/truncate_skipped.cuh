// SPDX-License-Identifier: Apache-2.0
// The entry of the skipped tokens of one row: their sum, in the order that ../truncate.h prescribes.
#pragma once

#include "element.cuh"
#include "truncate_gather.cuh"
#include "truncate_select.cuh"

namespace fsdc::cuda {

// Columns, kPack elements wide, are counted through the keys and on through the values; each share takes a
// run of them. A thread walks one column through one segment, then the segments are added up.
template <class Element, int kPack, int kThreads>
__device__ void sum_skipped(const float* scores, int64_t tokens, const Boundary& boundary, const RowCopy& keys,
                            const RowCopy& values, int64_t entry, uint32_t share, uint32_t shares) {
  using Sum = Accumulator<Element>;
  using Word = Access<kPack* static_cast<int>(sizeof(Element))>;
  constexpr int kAhead = 8;  // tokens of one thread in flight
  constexpr int kPackBytes = static_cast<int>(sizeof(Word));
  constexpr int kSegments = static_cast<int>(kSumSegments);
  constexpr int kColumns = kThreads / kSegments;  // walked at the same time
  FSDC_SHARED(sums, Sum[kSegments][kColumns * kPack]);

  const uint32_t key_columns = static_cast<uint32_t>(keys.token_bytes) / kPackBytes;
  const uint32_t columns = key_columns + static_cast<uint32_t>(values.token_bytes) / kPackBytes;
  const uint32_t per_share = (columns + shares - 1) / shares;
  const uint32_t end_column = min((share + 1) * per_share, columns);
  const int64_t run = (tokens + kSegments - 1) / kSegments;
  const uint32_t segment = threadIdx.x / kColumns;
  const uint32_t place = threadIdx.x % kColumns;
  const int64_t end_token = min((segment + 1) * run, tokens);

  for (uint32_t first_column = share * per_share; first_column < end_column; first_column += kColumns) {
    const uint32_t column = first_column + place;
    const bool is_key = column < key_columns;
    const int64_t column_offset = int64_t{is_key ? column : column - key_columns} * kPackBytes;
    const int64_t source_step = is_key ? keys.source_step : values.source_step;
    const char* token = (is_key ? keys.source : values.source) + column_offset + segment * run * source_step;

    Sum sum[kPack] = {};
    for (int64_t first = column < end_column ? segment * run : tokens; first < end_token; first += kAhead) {
      const int left = clamp_to_int(end_token - first);
      Word words[kAhead];
      bool skipped[kAhead];
      FSDC_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        skipped[i] = i < left && !boundary.keeps(key_of(scores + first, i), first + i);
        if (skipped[i]) words[i] = __ldg(reinterpret_cast<const Word*>(token));
        token += source_step;
      }
      FSDC_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (!skipped[i]) continue;
        const Pack<Element, kPack> pack = unpack<Element, kPack>(words[i]);
        FSDC_UNROLL
        for (int item = 0; item < kPack; ++item) sum[item] = add(sum[item], widen(pack.items[item]));
      }
    }
    FSDC_UNROLL
    for (uint32_t item = 0; item < kPack; ++item) sums[segment][place * kPack + item] = sum[item];
    __syncthreads();

    const uint32_t item = first_column * kPack + threadIdx.x;  // an element, counted like the columns
    if (threadIdx.x < kColumns * kPack && item < end_column * kPack) {
      Sum total = 0;
      for (int i = 0; i < kSegments; ++i) total = add(total, sums[i][threadIdx.x]);
      const bool of_keys = item < key_columns * kPack;
      const RowCopy& copy = of_keys ? keys : values;
      Element* const out = reinterpret_cast<Element*>(copy.out + entry * copy.token_bytes);
      narrow(total, out[of_keys ? item : item - key_columns * kPack]);
    }
    __syncthreads();  // before the next columns take the place of these
  }
}

}  // namespace fsdc::cuda
