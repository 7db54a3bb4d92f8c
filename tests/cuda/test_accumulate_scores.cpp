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
  bool has_gaps = false;      // between scores, query weights and carries, of another size in each dimension
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
  if (which.has_gaps) {
    params.score_token_stride = 2;
    params.score_head_stride = 2 * which.tokens + 3;
    params.score_batch_stride = which.heads * params.score_head_stride + 5;
    params.query_weight_batch_stride = 2;  // [Q, 2 B]
    params.query_weight_query_stride = 2 * which.batch;
    params.carry_stride = 3;
  }
  return params;
}

// The second query of the first batch row does not vote, and what it brings is NaN.
void silence_a_query(const AccumulateCase& which, Bytes& weights, Bytes& query_weights) {
  const AccumulateScoresParams params = params_of(which, nullptr, nullptr, nullptr, nullptr);
  std::memset(query_weights.data() + params.query_weight_query_stride * sizeof(float), 0, sizeof(float));
  for (int64_t head = 0; head < which.heads * which.group; ++head) {
    for (int64_t token = 0; token < which.tokens; ++token) {
      const int64_t at =
          head * params.weight_head_stride + params.weight_query_stride + token * params.weight_token_stride;
      store(which.dtype, kNaN, weights.data() + at * element_size(which.dtype));
    }
  }
}

void check_accumulate(const AccumulateCase& which) {
  CAPTURE(which.batch, which.heads, which.group, which.queries, which.tokens, which.overwrite, int(which.dtype),
          which.has_weights_and_carry, which.tokens_first, which.has_gaps);
  const AccumulateScoresParams strides = params_of(which, nullptr, nullptr, nullptr, nullptr);
  Bytes scores = random_elements(DType::kFloat32, which.batch * strides.score_batch_stride, 1);
  const float special[] = {kInf, -kInf, kNaN};
  if (scores.size() >= sizeof special) std::memcpy(scores.data(), special, sizeof special);
  const int64_t count = which.batch * which.heads * which.group * which.queries * which.tokens;
  Bytes weights = random_elements(which.dtype, count, 2);
  Bytes query_weights = random_elements(DType::kFloat32, which.batch * which.queries * (which.has_gaps ? 2 : 1), 3);
  const Bytes carry = random_elements(DType::kFloat32, which.batch * strides.carry_stride, 4);
  const bool all = which.has_weights_and_carry;
  if (all && which.queries > 1) silence_a_query(which, weights, query_weights);

  const DeviceMemory on_device(scores), device_weights(weights), device_query_weights(query_weights),
      device_carry(carry);
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
  check_accumulate({.has_gaps = true});
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
