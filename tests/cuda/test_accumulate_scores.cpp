// SPDX-License-Identifier: Apache-2.0
// accumulate_scores on the device, bit for bit what the CPU's kernels give.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <numeric>

#include "inputs.h"
#include "kernels/cpu/cpu.h"

using namespace fsdc;
using namespace fsdc::test;

namespace {

struct AccumulateCase {
  int64_t batch = 2, heads = 2, group = 3, queries = 4, tokens = 300;
  bool overwrite = false;
  DType dtype = DType::kFloat32;
  bool has_weights_and_carry = true;
  bool tokens_first = false;  // weights [S, Q, Hq, B] instead of [B, Hq, Q, S]
};

AccumulateScoresParams params_of(const AccumulateCase& which, char* scores, const char* weights,
                                 const char* query_weights, const char* carry) {
  const int64_t query_heads = which.heads * which.group;
  AccumulateScoresParams params{.batch = which.batch,
                                .heads = which.heads,
                                .group = which.group,
                                .queries = which.queries,
                                .tokens = which.tokens,
                                .overwrite = which.overwrite,
                                .dtype = which.dtype,
                                .scores = reinterpret_cast<float*>(scores),
                                .score_batch_stride = which.heads * which.tokens,
                                .score_head_stride = which.tokens,
                                .score_token_stride = 1,
                                .weights = weights,
                                .weight_batch_stride = query_heads * which.queries * which.tokens,
                                .weight_head_stride = which.queries * which.tokens,
                                .weight_query_stride = which.tokens,
                                .weight_token_stride = 1,
                                .query_weights = reinterpret_cast<const float*>(query_weights),
                                .query_weight_batch_stride = which.queries,
                                .query_weight_query_stride = 1,
                                .carry = reinterpret_cast<const float*>(carry),
                                .carry_stride = 1};
  if (which.tokens_first) {
    params.weight_batch_stride = 1;
    params.weight_head_stride = which.batch;
    params.weight_query_stride = which.batch * query_heads;
    params.weight_token_stride = which.batch * query_heads * which.queries;
  }
  return params;
}

void check_accumulate(const AccumulateCase& which) {
  CAPTURE(which.batch, which.heads, which.group, which.queries, which.tokens, which.overwrite, int(which.dtype),
          which.has_weights_and_carry, which.tokens_first);
  const int64_t rows = which.batch * which.heads;
  Bytes scores = random_elements(DType::kFloat32, rows * which.tokens, 1);
  const float special[] = {kInf, -kInf, kNaN};
  if (scores.size() >= sizeof special) std::memcpy(scores.data(), special, sizeof special);
  const Bytes weights = random_elements(which.dtype, rows * which.group * which.queries * which.tokens, 2);
  Bytes query_weights = random_elements(DType::kFloat32, which.batch * which.queries, 3);
  if (which.queries > 1) std::memset(query_weights.data() + 4, 0, 4);  // the second query does not vote
  const Bytes carry = random_elements(DType::kFloat32, which.batch, 4);

  const DeviceMemory on_device(scores), device_weights(weights), device_query_weights(query_weights),
      device_carry(carry);
  const bool all = which.has_weights_and_carry;
  accumulate_scores(params_of(which, on_device.data(), device_weights.data(),
                              all ? device_query_weights.data() : nullptr, all ? device_carry.data() : nullptr));
  cpu::accumulate_scores(params_of(which, scores.data(), weights.data(), all ? query_weights.data() : nullptr,
                                   all ? carry.data() : nullptr),
                         cpu::Sequential());
  REQUIRE(first_difference(DType::kFloat32, on_device.copy(), scores) == -1);
}

}  // namespace

TEST_CASE("accumulate_scores: sizes and types") {
  use_order(GENERATE(range(0, all_orders())));
  const DType dtype = GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64);
  const int64_t tokens = GENERATE(0, 1, 255, 256, 257, 700);
  for (const int64_t group : {1, 3, 4, 9}) {
    check_accumulate({.group = group, .tokens = tokens, .dtype = dtype});
    check_accumulate({.group = group, .tokens = tokens, .overwrite = true, .dtype = dtype});
  }
}

TEST_CASE("accumulate_scores: without query weights and carry, without queries, with other strides") {
  use_order(GENERATE(range(0, orders())));
  check_accumulate({.has_weights_and_carry = false});
  check_accumulate({.queries = 0});
  check_accumulate({.queries = 0, .overwrite = true});
  check_accumulate({.tokens_first = true});
}

TEST_CASE("accumulate_scores: more blocks than a grid may have are refused") {
  CHECK_THROWS(accumulate_scores(
      params_of({.batch = 1 << 16, .heads = 1 << 15, .tokens = 1}, nullptr, nullptr, nullptr, nullptr)));
}

TEST_CASE("accumulate_scores: addresses that no element can have are refused") {
  alignas(8) char memory[16] = {}, *const there = memory + 2;
  const AccumulateCase which{.batch = 1, .heads = 1, .group = 1, .queries = 1, .tokens = 1};
  CHECK_THROWS(accumulate_scores(params_of(which, there, memory, memory, memory)));
  CHECK_THROWS(accumulate_scores(params_of(which, memory, there, memory, memory)));
  CHECK_THROWS(accumulate_scores(params_of(which, memory, memory, there, memory)));
  CHECK_THROWS(accumulate_scores(params_of(which, memory, memory, memory, there)));
}
