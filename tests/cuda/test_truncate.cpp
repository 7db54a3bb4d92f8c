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

// Ways to share a row among blocks.
std::vector<cuda::TruncatePlan> all_plans() {
  std::vector<cuda::TruncatePlan> plans;
  for (const bool codes_on_chip : {false, true}) {
    for (const uint32_t cluster : {1u, 2u, 4u, 8u}) {
      if (cluster <= most_in_cluster()) plans.push_back({cluster, 1, codes_on_chip});
    }
    plans.push_back({1, 3, codes_on_chip});
    plans.push_back({std::min(2u, most_in_cluster()), 2, codes_on_chip});
  }
  return plans;
}

// With two plans, other ones at each call, or with every plan.
void check_with_plans(TruncateCase which, bool with_all = false) {
  static const std::vector<cuda::TruncatePlan> plans = all_plans();
  static size_t turn = 0;
  const TruncateResult expected = truncate_on_cpu(which);
  for (size_t i = 0; i < (with_all ? plans.size() : 2); ++i) {
    which.plan = plans[turn++ % plans.size()];
    check_truncate(which, expected);
  }
}

int generate_order(int orders) {
  const int order = GENERATE_COPY(range(0, orders));
  use_order(order);
  return order;
}

}  // namespace

// First, and quick: most of what can be wrong shows here, and tests/simt/mutants/run goes no further then.
TEST_CASE("truncate: every plan") {
  generate_order(all_orders());
  const int64_t tokens = tokens_per_round() + 20;
  TruncateCase which{.batch = 2, .tokens = tokens, .key_dim = 3, .scores = random_scores(2 * tokens)};
  for (const auto& [kept, has_skipped] : {std::pair{tokens / 3, false}, {tokens / 3, true}, {tokens, false}}) {
    which.kept = kept;
    which.has_skipped = has_skipped;
    check_with_plans(which, true);
  }
}

// Blocks go through their tokens in rounds: the last one just not full, full, and one token more.
TEST_CASE("truncate: round borders") {
  const int order = generate_order(all_orders());
  const uint32_t cluster = GENERATE(1u, 2u, 4u, 8u);
  if (cluster > most_in_cluster()) return;
  const int64_t round = tokens_per_round() * cluster;
  for (const int64_t tokens : {round - 1, round, round + 1}) {
    if (order > 0 && order < orders() && tokens <= round) continue;
    TruncateCase which{.tokens = tokens, .kept = tokens / 3, .key_dim = 3, .scores = random_scores(tokens)};
    for (const bool has_skipped : {false, true}) {
      which.has_skipped = has_skipped;
      const TruncateResult expected = truncate_on_cpu(which);
      for (const bool codes_on_chip : {false, true}) {
        which.plan = {cluster, 1, codes_on_chip};
        check_truncate(which, expected);
      }
    }
    which.has_skipped = false;
    which.weights = {.is_used = true};
    check_truncate(which, truncate_on_cpu(which));
  }
}

TEST_CASE("truncate: hostile scores") {
  const int64_t tokens = GENERATE(1, 2, 16, 17, 33, 512, 513, 1100);
  if (!is_fast() && tokens > 100) return;  // nothing that scores decide is new there, and round borders have a case
  const bool with_all = generate_order(orders()) == 0 && is_fast();
  for (const auto& [name, scores] : hostile_scores(tokens)) {
    CAPTURE(name);
    for (const int64_t kept : std::set<int64_t>{1, tokens / 3, tokens - 1, tokens}) {
      check_with_plans({.tokens = tokens, .kept = kept, .key_dim = 3, .value_dim = 0, .scores = scores}, with_all);
      if (kept == tokens) continue;
      check_with_plans(
          {.tokens = tokens, .kept = kept, .has_skipped = true, .key_dim = 3, .value_dim = 1, .scores = scores},
          with_all);
    }
  }
}

TEST_CASE("truncate: equal scores on both sides of a block's border") {
  const bool with_all = generate_order(orders()) == 0 && is_fast();
  for (const int64_t tokens : {40, 130, 520}) {
    if (!is_fast() && tokens != 130) continue;
    for (int64_t equal = 0; equal <= tokens; equal += tokens / 8) {  // the first so many are larger than the others
      std::vector<float> scores(size_t(tokens), 1.0f);
      std::fill_n(scores.begin(), equal, 2.0f);
      for (const int64_t kept : std::set<int64_t>{1, equal - 1, equal, equal + 1, tokens / 2, tokens - 1}) {
        if (kept < 1 || kept >= tokens) continue;
        for (const bool has_skipped : {false, true}) {
          check_with_plans({.tokens = tokens, .kept = kept, .has_skipped = has_skipped, .key_dim = 3, .scores = scores},
                           with_all);
        }
      }
    }
  }
}

TEST_CASE("truncate: element types and head dimensions") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64);
  const int order = generate_order(all_orders());
  for (const int64_t dim : {1, 3, 64, 2, 8, 17}) {
    if (!is_fast() && dim == 2) break;
    if (order >= orders() && dim != 64) continue;
    for (const bool has_skipped : {false, true}) {
      TruncateCase which{.batch = 2, .heads = 2, .tokens = 70, .kept = 20, .has_skipped = has_skipped, .dtype = dtype};
      which.key_dim = dim;
      which.value_dim = 5;
      which.scores = random_scores(which.rows() * which.tokens);
      check_with_plans(which);
      which.key_dim = which.value_dim = dim;
      check_with_plans(which);
      which.kept = which.tokens - has_skipped;
      check_with_plans(which);
    }
  }
}

// What a launch does where the driver says that fewer blocks fit side by side.
TEST_CASE("truncate: clusters no larger than fit on the device") {
  generate_order(orders());
  const uint32_t most = GENERATE(1u, 2u, 4u, 8u);
  if (!limit_clusters(most)) return;
  TruncateCase which{.tokens = 1000, .kept = 300, .key_dim = 64, .value_dim = 64, .scores = random_scores(1000)};
  const cuda::Device device{132, 32 << 10, 64 << 10, most_in_cluster()};
  which.plan = plan_truncate(detail::shape_of(which), device);
  CHECK(which.plan.cluster == std::min(most, 4u));  // 154 KB
  check_truncate(which, truncate_on_cpu(which));
  which.plan.cluster = 2 * most;
  CHECK_THROWS(truncate_on_device(which));
}

TEST_CASE("truncate: strides and alignment") {
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  generate_order(orders());
  for (const bool has_skipped : {false, true}) {
    TruncateCase which{.batch = 2, .heads = 2, .tokens = 40, .kept = 13, .has_skipped = has_skipped, .dtype = dtype};
    which.key_dim = which.value_dim = 16;
    which.scores = random_scores(which.rows() * which.tokens);
    for (const int64_t elements : {1, 2, 4}) {
      // Each alone, so that it alone decides how wide an access may be.
      for (int64_t TruncateCase::* const shifted :
           {&TruncateCase::unaligned_elements, &TruncateCase::unaligned_out, &TruncateCase::token_padding,
            &TruncateCase::head_padding, &TruncateCase::batch_padding}) {
        TruncateCase unaligned = which;
        unaligned.*shifted = elements;
        check_with_plans(unaligned);
      }
    }
    which.broadcast_tokens = true;
    check_with_plans(which);
  }
}

TEST_CASE("truncate: rows lie where the strides say") {
  generate_order(orders());
  for (const bool has_skipped : {false, true}) {
    TruncateCase which{.batch = 2, .heads = 3, .tokens = 40, .kept = 13, .has_skipped = has_skipped, .value_dim = 5};
    which.score_padding = 7;
    which.scores = random_scores(which.batch * which.score_batch_stride());
    check_with_plans(which);
    which.head_padding = 8;
    which.batch_padding = 12;
    check_with_plans(which);
    which.tokens_before_heads = true;
    check_with_plans(which);
  }
}

TEST_CASE("truncate: nothing to do, or nothing to compare") {
  generate_order(orders());
  check_with_plans({.batch = 0});
  check_with_plans({.tokens = 0, .kept = 0});
  check_with_plans({.tokens = 3, .kept = 0, .has_skipped = true, .scores = {1, 2, 3}});
  check_with_plans({.tokens = 100, .kept = 0, .has_skipped = true, .scores = random_scores(100)});
}

TEST_CASE("truncate: the sums of attention weights instead of scores") {
  const DType weights = GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64);
  generate_order(orders());
  for (const int64_t tokens : {15, 300, 1, 100, 700}) {
    if (!is_fast() && tokens == 1) break;
    TruncateCase which{.batch = 2, .heads = 2, .tokens = tokens, .kept = std::max<int64_t>(tokens / 3, 1)};
    for (const bool has_specials : {false, true}) {
      which.weights = {.is_used = true, .dtype = weights, .group = 3, .queries = 2, .has_specials = has_specials};
      const TruncateResult expected = truncate_on_cpu(which);
      for (uint32_t cluster = 1; cluster <= most_in_cluster(); cluster *= 2) {
        which.plan = {cluster, 1, true};
        check_truncate(which, expected);
      }
    }
    which.has_skipped = true;
    which.plan = {most_in_cluster(), 1, true};
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
      if (which.kept == which.tokens) break;
      which.dtype = dtype;
      check_truncate(which, truncate_on_cpu(which));
    }
  }
}

TEST_CASE("truncate: plans that cannot sum weights are refused") {
  TruncateCase which{.tokens = 40, .kept = 10};
  which.weights = {.is_used = true, .dtype = DType::kFloat32, .group = 1, .queries = 1};
  for (const cuda::TruncatePlan& plan : {cuda::TruncatePlan{1, 1, false}, cuda::TruncatePlan{1, 2, true}}) {
    which.plan = plan;
    CHECK_THROWS(truncate_on_device(which));
  }
}

TEST_CASE("truncate: addresses that no element can have are refused") {
  alignas(16) char memory[64] = {};
  const auto check_refused = [&](auto move) {
    const TokenRows rows{memory, 0, 0, 0, 1, memory};
    TruncateParams params = detail::params_of({.dtype = DType::kFloat64}, memory, rows, rows, memory);
    move(params);
    CHECK_THROWS(truncate(params, {}));
  };
  for (const int beyond : {1, 2}) {
    char* const there = memory + beyond;
    check_refused([&](TruncateParams& params) { params.scores = reinterpret_cast<float*>(there); });
    check_refused([&](TruncateParams& params) { params.indices = reinterpret_cast<int64_t*>(there); });
    for (TokenRows TruncateParams::* rows : {&TruncateParams::keys, &TruncateParams::values}) {
      check_refused([&](TruncateParams& params) { (params.*rows).source = there; });
      check_refused([&](TruncateParams& params) { (params.*rows).out = there; });
    }
    check_refused([&](TruncateParams& params) {
      params.scores = nullptr;
      params.weights.weights = there;
    });
  }
}

TEST_CASE("truncate: beyond the limits nothing is launched") {
  const auto check_refused = [](const TruncateCase& which) {
    CAPTURE(which.batch, which.heads, which.tokens, which.key_dim);
    CHECK_THROWS(truncate(detail::shape_of(which), which.plan));
  };
  check_refused({.tokens = int64_t{1} << 31});
  check_refused({.key_dim = int64_t{1} << 29});  // of 4 bytes
  check_refused({.value_dim = int64_t{1} << 29});
  check_refused({.batch = 1 << 16, .heads = 1 << 15});
  check_refused({.heads = 1 << 28, .plan = {.cluster = 8}});
}
