// SPDX-License-Identifier: Apache-2.0
// The entry of the skipped tokens of one row: their sum, in the order that kernels/truncate.h prescribes.
// That order is also the ceiling: a row has as many runs at a time as there are segments times columns, whatever the
// blocks. With few rows and narrow heads most threads of a block walk nothing, and latency, not bandwidth, decides. Not
// measured.
#pragma once

#include <type_traits>

#include "gather.cuh"
#include "kernels/cuda/element.cuh"
#include "select.cuh"

namespace fsdc::cuda {

// Columns [begin, end), kPack elements wide, counted through the keys and on through the values.
struct Columns {
  uint32_t of_keys;  // the first so many
  uint32_t begin;
  uint32_t end;
};

// Where a column starts in the team's first token, and the bytes from token to token.
struct ColumnSource {
  const char* first;
  int64_t step;
};

__device__ inline ColumnSource source_of(const Columns& columns, uint32_t column, int pack_bytes, const RowCopy& keys,
                                         const RowCopy& values) {
  const bool is_key = column < columns.of_keys;
  const RowCopy& copy = is_key ? keys : values;
  return {copy.source + int64_t{is_key ? column : column - columns.of_keys} * pack_bytes, copy.source_step};
}

// Room for the sums of one step of columns, of any type: 4 fp16 in fp32 are the most that a thread walks at a time.
template <int kThreads>
struct alignas(16) SumMemory {
  char bytes[kThreads * 4 * sizeof(float)];
};

// A thread walks one column through one segment of its block's tokens; then the segments of all blocks of the team are
// added up, each block some of the columns. The same columns for all blocks of a team.
template <class Element, int kPack, int kThreads, class Codes>
__device__ void sum_skipped(const Codes& codes_of_block, const Team& team, int64_t tokens, const Boundary& boundary,
                            const RowCopy& keys, const RowCopy& values, int64_t entry, const Columns& columns,
                            SumMemory<kThreads>& memory) {
  using Sum = Accumulator<Element>;
  using Word = Access<kPack* static_cast<int>(sizeof(Element))>;
  constexpr int kAhead = 8;  // tokens of one thread in flight
  constexpr uint32_t kSegments = static_cast<uint32_t>(kSumSegments);
  constexpr uint32_t kItems = kThreads / kSegments * kPack;  // elements that a block finishes at a time
  static_assert(kThreads * kPack * sizeof(Sum) <= sizeof memory.bytes);
  Sum* const sums = reinterpret_cast<Sum*>(memory.bytes);  // [segments of this block][elements walked at a time]

  const uint32_t segments = kSegments / team.blocks;
  const uint32_t walked = kThreads / segments;  // columns at a time
  const uint32_t segment = threadIdx.x / walked;
  const uint32_t place = threadIdx.x % walked;
  const int64_t run = tokens_per_segment(tokens);
  const int64_t begin = min(segment * run, team.tokens);  // counted from the block's first token
  const int64_t end = min(begin + run, team.tokens);

  for (uint32_t first_column = columns.begin; first_column < columns.end; first_column += walked) {
    const uint32_t column = first_column + place;
    const ColumnSource source = source_of(columns, column, static_cast<int>(sizeof(Word)), keys, values);
    const char* token = source.first + (team.first_token + begin) * source.step;
    Sum sum[kPack] = {};
    for (int64_t first = column < columns.end ? begin : end; first < end; first += kAhead) {
      const int left = clamp_to_int(end - first);
      Word words[kAhead];
      bool skipped[kAhead];
      FSDC_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        skipped[i] = i < left && !boundary.keeps(codes_of_block(first + i), team.first_token + first + i);
        if (skipped[i]) words[i] = __ldg(reinterpret_cast<const Word*>(token));
        token += source.step;
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
    for (uint32_t item = 0; item < kPack; ++item) sums[threadIdx.x * kPack + item] = sum[item];
    team_sync(team.blocks);

    const uint32_t item = team.rank * kItems + threadIdx.x;  // of those walked
    const uint32_t element = first_column * kPack + item;    // counted like the columns
    if (threadIdx.x < kItems && element < columns.end * kPack) {
      Sum total = 0;
      for (uint32_t i = 0; i < kSegments; ++i) {
        const Sum* const of_block = team.blocks == 1 ? sums : cluster_map(sums, i / segments);
        total = add(total, of_block[i % segments * walked * kPack + item]);
      }
      const bool of_keys = element < columns.of_keys * kPack;
      const RowCopy& copy = of_keys ? keys : values;
      Element* const out = reinterpret_cast<Element*>(copy.out + entry * copy.token_bytes);
      narrow(total, out[of_keys ? element : element - columns.of_keys * kPack]);
    }
    team_sync(team.blocks);  // before the next columns take the place of these, or the block ends
  }
}

// The entry of one row: each cluster of the row sums some of the columns.
template <int kThreads, class Codes>
__device__ void sum_skipped_tokens(const Codes& codes_of_block, const Team& team, const TruncateParams& params,
                                   const Boundary& boundary, const RowCopy& keys, const RowCopy& values, int access,
                                   uint32_t cluster, uint32_t clusters_per_row) {
  FSDC_SHARED(memory, SumMemory<kThreads>);
  const auto sum = [&](auto element, auto pack) {
    using Element = typename decltype(element)::type;
    constexpr int kPack = decltype(pack)::value;
    constexpr uint32_t kPackBytes = kPack * sizeof(Element);
    const uint32_t of_keys = static_cast<uint32_t>(keys.token_bytes) / kPackBytes;
    const uint32_t all = of_keys + static_cast<uint32_t>(values.token_bytes) / kPackBytes;
    const uint32_t per_cluster = (all + clusters_per_row - 1) / clusters_per_row;
    const Columns columns{of_keys, min(cluster * per_cluster, all), min((cluster + 1) * per_cluster, all)};
    sum_skipped<Element, kPack, kThreads>(codes_of_block, team, params.tokens, boundary, keys, values, params.kept,
                                          columns, memory);
  };
  switch_element(params.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    if (access >= 8) {
      sum(element, std::integral_constant<int, 8 / static_cast<int>(sizeof(Element))>{});
    } else {
      sum(element, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace fsdc::cuda
