// SPDX-License-Identifier: Apache-2.0
// The inner loop of accumulate_scores, once per instruction set.
#pragma once

#include <cstdint>

#include "kernels/accumulate_scores.h"
#include "kernels/cpu/isa.h"

namespace fsdc::cpu {

struct AccumulateScoresLoops {
  // Adds the weights of columns [begin, end) of one row to its scores. See accumulate_scores.inc.
  void (*accumulate_columns)(const AccumulateScoresParams& params, int64_t row, int64_t begin, int64_t end);
};

const AccumulateScoresLoops& accumulate_scores_loops(Isa isa);

}  // namespace fsdc::cpu
