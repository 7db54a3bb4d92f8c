// SPDX-License-Identifier: Apache-2.0
// decode_attention on every instruction set of this machine, against a step in double.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>

#include "decode_check.h"
#include "kernels/cpu/cpu.h"
#include "threads.h"

namespace {

using namespace fsdc;

cpu::Isa any_isa() { return GENERATE(from_range(cpu::available_isas())); }

DType any_dtype() { return GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64); }

// Runs the step and compares each of its rows that is not padding.
void check(test::DecodeStep& step, const cpu::Isa isa) {
  test::DecodeStep before = step;
  cpu::decode_attention(step.params(), test::Threads(3), isa);
  CAPTURE(cpu::name_of(isa));
  test::require_step(step, before);
}

}  // namespace

TEST_CASE("a decode step, from the first token on") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const int64_t length = GENERATE(0, 1, 19, 20, 21, 300);
  const bool has_entry = GENERATE(false, true);
  test::DecodeStep step({.length = length, .dtype = dtype, .has_entry = has_entry});
  check(step, isa);
}

TEST_CASE("a decode step of any dimensions") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const auto [dim, value_dim] = GENERATE(table<int64_t, int64_t>(
      {{1, 1}, {3, 7}, {8, 16}, {15, 17}, {16, 8}, {31, 33}, {64, 64}, {80, 65}, {128, 128}, {192, 128}}));
  const int64_t group = GENERATE(1, 4, 7, 13);
  test::DecodeStep step({.group = group, .dim = dim, .value_dim = value_dim, .dtype = dtype, .has_holes = true});
  check(step, isa);
}

TEST_CASE("a decode step with rows cut into runs") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const int64_t slots = GENERATE(63, 255, 256, 512, 1100);
  const bool has_holes = GENERATE(false, true);
  test::DecodeStep step({.batch = 1,
                         .slots = slots,
                         .dim = 12,
                         .length = slots + 1,
                         .dtype = dtype,
                         .has_holes = has_holes,
                         .has_entry = true,
                         .has_sinks = true});
  check(step, isa);
}

TEST_CASE("a decode step with a soft cap") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const double softcap = GENERATE(0.5, 2.0, 30.0);
  const bool has_sinks = GENERATE(false, true);
  test::DecodeStep step({.dim = 33, .dtype = dtype, .has_entry = true, .has_sinks = has_sinks, .softcap = softcap});
  check(step, isa);
}

TEST_CASE("a decode step gives the same bits for any number of threads") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const int64_t batch = GENERATE(1, 9);
  const test::DecodeStep start({.batch = batch,
                                .slots = 700,
                                .dim = 20,
                                .length = 800,
                                .dtype = dtype,
                                .has_holes = true,
                                .has_entry = true,
                                .has_sinks = true});
  test::DecodeStep expected = start;
  cpu::decode_attention(expected.params(), cpu::Sequential(), isa);
  for (const int threads : {1, 2, 3, 7, 64}) {
    test::DecodeStep step = start;
    cpu::decode_attention(step.params(), test::Threads(threads), isa);
    CAPTURE(cpu::name_of(isa), threads);
    CHECK(step.output == expected.output);
    CHECK(step.same_state(expected));
  }
}

TEST_CASE("a padded row stays as it was") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const int64_t length = GENERATE(0, 7, 700, 900);
  test::DecodeStep step({.slots = 800, .length = length, .dtype = dtype, .has_holes = true, .has_entry = true});
  step.valid = {0, 0};
  for (test::Numbers* numbers : {&step.query, &step.new_keys, &step.new_values, &step.output}) {
    for (int64_t i = 0; i < numbers->size(); ++i) numbers->set(i, std::nan(""));
  }
  const test::DecodeStep before = step;
  cpu::decode_attention(step.params(), test::Threads(2), isa);
  CHECK(step.same_state(before));
  for (int64_t i = 0; i < step.output.size(); ++i) REQUIRE(step.output[i] == 0);
}

TEST_CASE("whatever an empty slot holds does not count") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const double junk = GENERATE(std::nan(""), test::kInfinity, -test::kInfinity);
  const test::DecodeStep clean({.slots = 300, .length = 310, .dtype = dtype, .has_holes = true});
  test::DecodeStep expected = clean, step = clean;
  for (int64_t slot = 0; slot < step.rows; ++slot) {
    if (step.positions[slot] >= 0) continue;
    for (int64_t d = 0; d < 8; ++d) step.keys.set(slot * 8 + d, junk), step.values.set(slot * 8 + d, junk);
  }
  cpu::decode_attention(expected.params(), cpu::Sequential(), isa);
  cpu::decode_attention(step.params(), cpu::Sequential(), isa);
  CHECK(step.output == expected.output);
  CHECK(step.positions == expected.positions);
}

TEST_CASE("KV heads with slots of their own") {
  const cpu::Isa isa = any_isa();
  const DType dtype = any_dtype();
  const int64_t length = GENERATE(0, 4, 200);
  // 3 and 36 of them, in the memory of 2 heads with 20; each alone must give the same.
  test::DecodeStep both({.batch = 1, .length = length, .dtype = dtype});
  both.layout = {0, 3, 1, 3, 4, 36, 1, 3};
  for (int64_t slot = 0; slot < both.rows; ++slot) {
    const int64_t first = slot < 4 ? 0 : 4, slots = slot < 4 ? 3 : 36;
    const bool is_held = slot - first < std::min(length, slots);
    both.positions[slot] = is_held ? int32_t(slot - first) : -1;
    both.facts[slot] = is_held ? 1.0f : -std::numeric_limits<float>::infinity();
  }
  test::DecodeStep alone = both;
  DecodeAttentionParams params_of_both = both.params();
  params_of_both.slots = 36;
  cpu::decode_attention(params_of_both, test::Threads(2), isa);
  for (int64_t head = 0; head < 2; ++head) {
    const int64_t first = alone.layout[4 * head];
    DecodeAttentionParams params = alone.params();
    params.heads_layout = nullptr;
    params.heads = 1;
    params.slots = alone.layout[4 * head + 1];
    const auto skip = [&](const void* data, int64_t elements) {
      return const_cast<char*>(static_cast<const char*>(data)) + elements * element_size(dtype);
    };
    params.query.data = skip(params.query.data, head * alone.is.group * alone.is.dim);
    params.new_keys.data = skip(params.new_keys.data, head * alone.is.dim);
    params.new_values.data = skip(params.new_values.data, head * alone.is.value_dim);
    params.keys.data = skip(params.keys.data, first * alone.is.dim);
    params.values.data = skip(params.values.data, first * alone.is.value_dim);
    params.output = skip(params.output, head * alone.is.group * alone.is.value_dim);
    params.facts += first;
    params.positions += first;
    std::vector<int32_t> seen = {int32_t(length)};
    params.seen = seen.data();
    cpu::decode_attention(params, cpu::Sequential(), isa);
  }
  alone.seen[0] += 1;
  CHECK(both.same_state(alone));
  CHECK(both.output == alone.output);
}
