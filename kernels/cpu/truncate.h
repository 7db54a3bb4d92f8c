// SPDX-License-Identifier: Apache-2.0
// The inner loops of truncate, once per instruction set.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/select_row.h"
#include "kernels/truncate.h"

namespace fsdc::cpu {

struct TruncateLoops {
  // The `kept` best of `tokens` scores, ascending. See select_row.inc.
  void (*select_row)(const float* scores, int64_t tokens, int64_t kept, int64_t* indices);

  // Its steps, for a row that several threads share: a range, all parts split by it, the threshold, all parts written.
  // Where that is kTopCode, keep_top writes the row instead.
  CodeRange (*guess_range)(const float* scores, int64_t tokens, int64_t kept);
  void (*split_part)(const float* scores, const CodeRange& range, RowPart& part);
  uint32_t (*find_threshold)(const float* scores, int64_t kept, const CodeRange& range, RowPart* parts,
                             int64_t count_of_parts);
  void (*write_part)(const float* scores, uint32_t code, const RowPart& part, int64_t* indices);
  void (*keep_top)(const float* scores, int64_t tokens, int64_t kept, int64_t* indices);

  // Copies the rows that `indices[begin, end)` names; past the caches if `stream`. See copy_rows.inc.
  void (*copy_rows)(const char* source, int64_t stride_bytes, int64_t row_bytes, const int64_t* indices, int64_t begin,
                    int64_t end, bool stream, char* out);

  // Sums columns [begin, end) of the tokens of one row that are not in `kept_indices`. See sum_skipped.inc.
  void (*sum_skipped)(const TruncateParams& params, const TokenRows& rows, int64_t row, const int64_t* kept_indices,
                      int64_t begin, int64_t end);
};

const TruncateLoops& truncate_loops(Isa isa);

}  // namespace fsdc::cpu
