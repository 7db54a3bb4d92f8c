// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/truncate.h"

#include <algorithm>

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

int64_t grain_for(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_item));
}

void select(const TruncateParams& params, const Parallel& parallel, const TruncateLoops& loops) {
  parallel.run(params.rows(), grain_for(params.tokens * int64_t{sizeof(float)}), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* scores = params.scores + row / params.heads * params.score_batch_stride +
                            row % params.heads * params.score_head_stride;
      int64_t* indices = params.indices + row * params.entries();
      loops.select_row(scores, params.tokens, params.kept, indices);
      if (params.has_skipped) indices[params.kept] = -1;
    }
  });
}

// Copies the kept tokens of ranks [first, last) of one row.
void copy_tokens(const TruncateParams& params, const TokenRows& tokens, int64_t row, int64_t first, int64_t last,
                 const TruncateLoops& loops) {
  const int64_t element = element_size(params.dtype);
  const int64_t row_bytes = tokens.head_dim * element;
  const int64_t offset = row / params.heads * tokens.batch_stride + row % params.heads * tokens.head_stride;
  loops.copy_rows(static_cast<const char*>(tokens.source) + offset * element, tokens.token_stride * element, row_bytes,
                  params.indices + row * params.entries(), first, last,
                  static_cast<char*>(tokens.out) + row * params.entries() * row_bytes);
}

// One item is one kept token of one row, so that a single row is shared among threads too.
void gather(const TruncateParams& params, const Parallel& parallel, const TruncateLoops& loops) {
  const int64_t token_bytes = (params.keys.head_dim + params.values.head_dim) * element_size(params.dtype);
  parallel.run(params.rows() * params.kept, grain_for(token_bytes), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / params.kept;
      const int64_t first = begin % params.kept;
      const int64_t last = std::min(params.kept, first + (end - begin));
      copy_tokens(params, params.keys, row, first, last, loops);
      copy_tokens(params, params.values, row, first, last, loops);
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
  if (params.rows() == 0 || params.entries() == 0) return;
  const TruncateLoops& loops = truncate_loops(isa);
  select(params, parallel, loops);
  gather(params, parallel, loops);
  if (params.has_skipped) {
    sum_skipped(params, params.keys, parallel, loops);
    sum_skipped(params, params.values, parallel, loops);
  }
}

}  // namespace fsdc::cpu
