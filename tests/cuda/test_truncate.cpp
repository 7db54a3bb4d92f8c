// SPDX-License-Identifier: Apache-2.0
// truncate on the device, bit for bit what the CPU's kernels give.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <set>

#include "truncate_case.h"

using namespace fsdc;
using namespace fsdc::test;

namespace {

std::vector<float> random_scores(int64_t count) { return hostile_scores(count).at("random"); }

}  // namespace

TEST_CASE("truncate: hostile scores") {
  use_order(GENERATE(range(0, orders())));
  const int64_t tokens = GENERATE(1, 2, 31, 32, 33, 64, 511, 512, 513, 1100);
  for (const auto& [name, scores] : hostile_scores(tokens)) {
    CAPTURE(name);
    for (const int64_t kept : std::set<int64_t>{1, tokens / 3, tokens - 1, tokens}) {
      check_truncate({.tokens = tokens, .kept = kept, .key_dim = 1, .value_dim = 0, .scores = scores});
      if (kept == tokens) continue;
      check_truncate(
          {.tokens = tokens, .kept = kept, .has_skipped = true, .key_dim = 1, .value_dim = 1, .scores = scores});
    }
  }
}

TEST_CASE("truncate: element types and head dimensions") {
  use_order(GENERATE(range(0, orders())));
  const DType dtype = GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64);
  for (const int64_t dim : {1, 2, 3, 8, 17, 64}) {
    for (const bool has_skipped : {false, true}) {
      TruncateCase which{.batch = 2, .heads = 2, .tokens = 70, .kept = 20, .has_skipped = has_skipped, .dtype = dtype};
      which.key_dim = dim;
      which.value_dim = 5;
      which.scores = random_scores(which.rows() * which.tokens);
      check_truncate(which);
      which.key_dim = which.value_dim = dim;
      check_truncate(which);
      which.kept = which.tokens - has_skipped;
      check_truncate(which);
    }
  }
}

TEST_CASE("truncate: strides and alignment") {
  use_order(GENERATE(range(0, orders())));
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  for (const bool has_skipped : {false, true}) {
    TruncateCase which{.batch = 2, .heads = 1, .tokens = 90, .kept = 33, .has_skipped = has_skipped, .dtype = dtype};
    which.key_dim = which.value_dim = 16;
    which.scores = random_scores(which.rows() * which.tokens);
    for (const int64_t elements : {1, 2, 4}) {
      TruncateCase unaligned = which, padded = which;
      unaligned.unaligned_elements = elements;
      padded.token_padding = elements;
      check_truncate(unaligned);
      check_truncate(padded);
    }
    which.broadcast_tokens = true;
    check_truncate(which);
  }
}

TEST_CASE("truncate: few rows are shared among blocks") {
  use_order(GENERATE(range(0, orders())));
  // 700 tokens of 1 KiB: more than one share's worth.
  for (const bool has_skipped : {false, true}) {
    TruncateCase which{.heads = 3, .tokens = 700, .kept = 500, .has_skipped = has_skipped};
    which.key_dim = which.value_dim = 128;
    which.scores = random_scores(which.rows() * which.tokens);
    check_truncate(which);
  }
}

TEST_CASE("truncate: nothing to do") {
  use_order(GENERATE(range(0, orders())));
  check_truncate({.batch = 0});
  check_truncate({.tokens = 0, .kept = 0});
  check_truncate({.tokens = 3, .kept = 0, .has_skipped = true, .scores = {1, 2, 3}});
}
