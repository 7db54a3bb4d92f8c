// SPDX-License-Identifier: Apache-2.0
// What the steps of a selection hand to each other. See select_row.inc.
#pragma once

#include <cstdint>

namespace fsdc::cpu {

inline constexpr uint32_t kTopCode = 0xff000001u;  // of +inf; those of NaN are above

inline constexpr int64_t kSelectRoom = 16384;  // codes at a time: a sample, or those set apart

// The code of the last score to stay most likely lies in [low, high].
struct CodeRange {
  uint32_t low;
  uint32_t high;
};

// Tokens [begin, end) of a row. A row is one part, or several where threads would be idle.
struct RowPart {
  int64_t begin = 0;
  int64_t end = 0;
  uint32_t* inside = nullptr;  // room for kSelectRoom codes: those strictly within the range
  int64_t size = 0;            // how many these are
  bool is_full = false;        // there were more of them
  int64_t at_least_high = 0;   // how many scores reach the upper end of the range
  int64_t first = 0;           // where this part's tokens go among those that stay
  int64_t surplus = 0;         // of those equal to the last to stay, the oldest, which go
};

}  // namespace fsdc::cpu
