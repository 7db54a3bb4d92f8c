// SPDX-License-Identifier: Apache-2.0
// Whether a step of decode_attention is what it must be, for kernels of the CPU and of CUDA.
#pragma once

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include "decode_step.h"

namespace fsdc::test {

inline double tolerance(DType dtype) {  // of outputs about 1
  return dtype == DType::kFloat64 ? 1e-12 : dtype == DType::kFloat32 ? 2e-6 : dtype == DType::kFloat16 ? 2e-3 : 1.5e-2;
}

// Each row that is not padding, of the step that came of `before`.
inline void require_step(DecodeStep& step, DecodeStep& before) {
  using Catch::Matchers::WithinAbs;
  const DecodeShape& is = step.is;
  const int64_t T = step.in_use();
  for (int64_t row = 0; row < is.batch * is.heads; ++row) {
    CAPTURE(int(is.dtype), is.slots, is.dim, is.value_dim, is.group, is.length, row);
    const ExpectedRow expected = expected_row(before, row);
    for (int64_t i = 0; i < is.group * is.value_dim; ++i) {
      REQUIRE_THAT(step.output[row * is.group * is.value_dim + i], WithinAbs(expected.output[i], tolerance(is.dtype)));
    }
    for (int64_t j = 0; j < T; ++j) {
      if (j == expected.slot) continue;
      REQUIRE(step.positions[step.at(row, j)] == before.positions[step.at(row, j)]);
      if (step.positions[step.at(row, j)] < 0) continue;
      REQUIRE_THAT(step.fact(kScores, row, j), WithinAbs(expected.scores[j], 1e-5));
      REQUIRE_THAT(step.fact(kRedundancy, row, j), WithinAbs(expected.redundancy[j], 2e-6));
    }
    const bool stays = expected.slot < is.slots;
    if (is.has_entry) {
      REQUIRE(step.skipped_count[row] ==
              before.skipped_count[row] +
                  (T == is.slots && (!stays || before.positions[step.at(row, expected.slot)] >= 0)));
    }
    if (!stays) continue;
    const int64_t slot = step.at(row, expected.slot);
    REQUIRE(step.positions[slot] == before.seen[row / is.heads]);
    REQUIRE_THAT(step.fact(kScores, row, expected.slot), WithinAbs(expected.scores[T], 1e-5));
    REQUIRE(step.fact(kRedundancy, row, expected.slot) == 0);
    for (int64_t d = 0; d < is.dim; ++d) REQUIRE(step.keys[slot * is.dim + d] == before.new_keys[row * is.dim + d]);
    for (int64_t d = 0; d < is.value_dim; ++d) {
      REQUIRE(step.values[slot * is.value_dim + d] == before.new_values[row * is.value_dim + d]);
    }
  }
  for (int64_t b = 0; b < is.batch; ++b) REQUIRE(step.seen[b] == before.seen[b] + 1);
}

}  // namespace fsdc::test
