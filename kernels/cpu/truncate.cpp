// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/truncate.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/cpu.h"

namespace fsdc::cpu {

namespace portable {
extern const TruncateLoops kTruncateLoops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TruncateLoops kTruncateLoops;
}
namespace avx512 {
extern const TruncateLoops kTruncateLoops;
}
#endif

const TruncateLoops& truncate_loops([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512::kTruncateLoops;
  if (isa >= Isa::kAvx2) return avx2::kTruncateLoops;
#endif
  return portable::kTruncateLoops;
}

namespace {

constexpr int64_t kBytesPerThread = 1 << 16;  // below this another thread costs more than it brings
constexpr int64_t kStreamBytes = 1 << 24;     // below this what is written is still in a cache when it is read

int64_t grain_for(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_item));
}

const float* scores_of(const TruncateParams& params, int64_t row) {
  return params.scores + row / params.heads * params.score_batch_stride + row % params.heads * params.score_head_stride;
}

// One item is one row.
void select_rows(const TruncateParams& params, const Parallel& parallel, const TruncateLoops& loops) {
  parallel.run(params.rows(), grain_for(params.tokens * int64_t{sizeof(float)}), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      loops.select_row(scores_of(params, row), params.tokens, params.kept, params.indices + row * params.entries());
    }
  });
}

// One item is one part of one row, for long rows that are fewer than threads. The steps of select_row.
void select_parts(const TruncateParams& params, int64_t parts, const Parallel& parallel, const TruncateLoops& loops) {
  struct Row {
    const float* scores;
    CodeRange range;
    uint32_t code;
  };
  std::vector<Row> rows(params.rows());
  std::vector<RowPart> row_parts(params.rows() * parts);
  const auto room = std::make_unique_for_overwrite<uint32_t[]>(row_parts.size() * kSelectRoom);
  parallel.run(params.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rows[i].scores = scores_of(params, i);
      rows[i].range = loops.guess_range(rows[i].scores, params.tokens, params.kept);
    }
  });
  parallel.run(params.rows() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      row_parts[i].begin = i % parts * params.tokens / parts;
      row_parts[i].end = (i % parts + 1) * params.tokens / parts;
      row_parts[i].inside = room.get() + i * kSelectRoom;
      loops.split_part(rows[i / parts].scores, rows[i / parts].range, row_parts[i]);
    }
  });
  parallel.run(params.rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Row& row = rows[i];
      row.code = loops.find_threshold(row.scores, params.kept, row.range, &row_parts[i * parts], parts);
      if (row.code < kTopCode) continue;
      loops.keep_top(row.scores, params.tokens, params.kept, params.indices + i * params.entries());
    }
  });
  parallel.run(params.rows() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row& row = rows[i / parts];
      if (row.code == kTopCode) continue;
      loops.write_part(row.scores, row.code, row_parts[i], params.indices + i / parts * params.entries());
    }
  });
}

void select(const TruncateParams& params, const Parallel& parallel, const TruncateLoops& loops) {
  constexpr int64_t kLeastTokens = 16384, kMostParts = 16;
  const int64_t parts = std::min(params.tokens / kLeastTokens, kMostParts);
  if (parts > 1 && params.rows() < parallel.threads() && 0 < params.kept && params.kept < params.tokens) {
    select_parts(params, parts, parallel, loops);
  } else {
    select_rows(params, parallel, loops);
  }
  if (!params.has_skipped) return;
  for (int64_t row = 0; row < params.rows(); ++row) params.indices[row * params.entries() + params.kept] = -1;
}

// Copies the kept tokens of ranks [first, last) of one row.
void copy_tokens(const TruncateParams& params, const TokenRows& tokens, int64_t row, int64_t first, int64_t last,
                 bool stream, const TruncateLoops& loops) {
  const int64_t element = element_size(params.dtype);
  const int64_t row_bytes = tokens.head_dim * element;
  const int64_t offset = row / params.heads * tokens.batch_stride + row % params.heads * tokens.head_stride;
  loops.copy_rows(static_cast<const char*>(tokens.source) + offset * element, tokens.token_stride * element, row_bytes,
                  params.indices + row * params.entries(), first, last, stream,
                  static_cast<char*>(tokens.out) + row * params.entries() * row_bytes);
}

// One item is one kept token of one row, so that a single row is shared among threads too.
void gather(const TruncateParams& params, const Parallel& parallel, const TruncateLoops& loops) {
  const int64_t token_bytes = (params.keys.head_dim + params.values.head_dim) * element_size(params.dtype);
  const bool stream = params.rows() * params.kept * token_bytes >= kStreamBytes;
  parallel.run(params.rows() * params.kept, grain_for(token_bytes), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / params.kept;
      const int64_t first = begin % params.kept;
      const int64_t last = std::min(params.kept, first + (end - begin));
      copy_tokens(params, params.keys, row, first, last, stream, loops);
      copy_tokens(params, params.values, row, first, last, stream, loops);
      begin += last - first;
    }
  });
}

// One item is some columns of one row, which leaves the order of the sum alone.
void sum_skipped(const TruncateParams& params, const TokenRows& tokens, const Parallel& parallel,
                 const TruncateLoops& loops) {
  constexpr int64_t kColumnsPerItem = 64;
  const int64_t items_per_row = (tokens.head_dim + kColumnsPerItem - 1) / kColumnsPerItem;
  if (items_per_row == 0) return;
  const int64_t bytes_per_item = params.tokens * kColumnsPerItem * element_size(params.dtype);
  parallel.run(params.rows() * items_per_row, grain_for(bytes_per_item), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / items_per_row;
      const int64_t first = begin % items_per_row;
      const int64_t last = std::min(items_per_row, first + (end - begin));
      loops.sum_skipped(params, tokens, row, params.indices + row * params.entries(), first * kColumnsPerItem,
                        std::min(tokens.head_dim, last * kColumnsPerItem));
      begin += last - first;
    }
  });
}

}  // namespace

void truncate(const TruncateParams& params, const Parallel& parallel, Isa isa) {
  const TruncateLoops& loops = truncate_loops(isa);
  if (params.rows() == 0 || params.entries() == 0) return;
  select(params, parallel, loops);
  gather(params, parallel, loops);
  if (params.has_skipped) {
    sum_skipped(params, params.keys, parallel, loops);
    sum_skipped(params, params.values, parallel, loops);
  }
}

}  // namespace fsdc::cpu
