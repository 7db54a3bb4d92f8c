// SPDX-License-Identifier: Apache-2.0
// accumulate_scores on every instruction set of this machine, bit for bit.
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/cpu/cpu.h"
#include "threads.h"

namespace {

using namespace fsdc;

constexpr int64_t kBatch = 2, kHeads = 2, kGroup = 3, kQueries = 4, kTokens = 1030;

std::vector<float> random_numbers(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> numbers(count);
  for (float& number : numbers) number = std::generate_canonical<float, 24>(generator);
  return numbers;
}

struct Inputs {
  std::vector<float> scores = random_numbers(kBatch * kHeads * kTokens, 1);
  std::vector<float> weights = random_numbers(kBatch * kHeads * kGroup * kQueries * kTokens, 2);
  std::vector<float> query_weights = random_numbers(kBatch * kQueries, 3);
  std::vector<float> carry = random_numbers(kBatch, 4);

  AccumulateScoresParams params() {
    return {.batch = kBatch,
            .heads = kHeads,
            .group = kGroup,
            .queries = kQueries,
            .tokens = kTokens,
            .overwrite = false,
            .dtype = DType::kFloat32,
            .scores = scores.data(),
            .score_batch_stride = kHeads * kTokens,
            .score_head_stride = kTokens,
            .score_token_stride = 1,
            .weights = weights.data(),
            .weight_batch_stride = kHeads * kGroup * kQueries * kTokens,
            .weight_head_stride = kQueries * kTokens,
            .weight_query_stride = kTokens,
            .weight_token_stride = 1,
            .query_weights = query_weights.data(),
            .query_weight_batch_stride = kQueries,
            .query_weight_query_stride = 1,
            .carry = carry.data(),
            .carry_stride = 1};
  }
};

// volatile: every step is rounded to float, whatever the compiler would like to fuse.
float expected_score(const Inputs& in, int64_t b, int64_t h, int64_t s, bool overwrite) {
  volatile float delta = 0;
  for (int64_t q = 0; q < kQueries; ++q) {
    volatile float sum = 0;
    for (int64_t g = 0; g < kGroup; ++g) {
      const float p = in.weights[(((b * kHeads + h) * kGroup + g) * kQueries + q) * kTokens + s];
      sum = g == 0 ? p : sum + p;
    }
    volatile float product = in.query_weights[b * kQueries + q] * sum;
    delta = delta + product;
  }
  if (overwrite) return delta;
  const float score = in.scores[(b * kHeads + h) * kTokens + s];
  volatile float carried = in.carry[b] * score;
  return std::isfinite(score) ? carried + delta : score;
}

}  // namespace

TEST_CASE("scores are summed in the order of the contract") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  const bool overwrite = GENERATE(false, true);
  const int threads = GENERATE(1, 2, 5);
  Inputs in;
  const float inf = std::numeric_limits<float>::infinity();
  in.scores[3] = inf;
  in.scores[4] = -inf;
  Inputs before = in;
  AccumulateScoresParams params = in.params();
  params.overwrite = overwrite;
  cpu::accumulate_scores(params, test::Threads(threads), isa);
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t s = 0; s < kTokens; ++s) {
        CAPTURE(cpu::name_of(isa), b, h, s);
        REQUIRE(std::bit_cast<uint32_t>(in.scores[(b * kHeads + h) * kTokens + s]) ==
                std::bit_cast<uint32_t>(expected_score(before, b, h, s, overwrite)));
      }
    }
  }
}

TEST_CASE("a query of weight zero is not read") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  Inputs in;
  in.query_weights[1] = 0;
  for (int64_t s = 0; s < kTokens; ++s) in.weights[kTokens + s] = std::numeric_limits<float>::quiet_NaN();
  cpu::accumulate_scores(in.params(), cpu::Sequential(), isa);
  CHECK(std::none_of(in.scores.begin(), in.scores.end(), [](float score) { return std::isnan(score); }));
}
