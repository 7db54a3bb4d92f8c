// SPDX-License-Identifier: Apache-2.0
// decode_attention on the device, against a step in double and against the CPU's kernels, for every way to cut a row.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>

#include "decode_case.h"

using namespace fsdc;
using namespace fsdc::test;

namespace {

DType any_dtype() { return GENERATE(DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64); }

int generate_order(int orders) {
  const int order = GENERATE_COPY(range(0, orders));
  use_order(order);
  return order;
}

// Ways to cut a row of so many tokens, the new one among them.
std::vector<cuda::DecodePlan> all_plans(int64_t tokens) {
  std::vector<cuda::DecodePlan> plans;
  for (const uint32_t cluster : {1u, 2u, 4u, 8u}) {
    if (cluster <= most_in_cluster()) plans.push_back({cluster, false, (tokens + cluster - 1) / cluster});
  }
  for (const int64_t run_tokens : {int64_t{1}, int64_t{7}, (tokens + 2) / 3, tokens}) {
    plans.push_back({1, true, std::max(run_tokens, (tokens + 39) / 40)});
  }
  return plans;
}

void check(const DecodeStep& start, const cuda::DecodePlan& plan) {
  CAPTURE(plan.cluster, plan.is_split, plan.run_tokens);
  DecodeStep step = start, before = start;
  decode_on_device(step, plan);
  require_step(step, before);
}

// With two plans, other ones at each call and in another order of threads, or with every plan.
void check_with_plans(const DecodeStep& step, bool with_all = false) {
  static size_t turn = 0;
  const std::vector<cuda::DecodePlan> plans = all_plans(step.in_use() + 1);
  for (size_t i = 0; i < (with_all ? plans.size() : 2); ++i) {
    if (!with_all) use_order(int(turn) % orders());
    check(step, plans[turn++ % plans.size()]);
  }
}

// The same step with other parameters, against the CPU's kernel.
void check_change(const DecodeStep& start, const DecodeChange& change) {
  DecodeStep expected = start;
  DecodeAttentionParams params = expected.params();
  change(params);
  cpu::decode_attention(params, cpu::Sequential());
  for (const cuda::DecodePlan& plan : all_plans(start.in_use() + 1)) {
    CAPTURE(plan.cluster, plan.is_split, plan.run_tokens);
    DecodeStep step = start;
    decode_on_device(step, plan, change);
    require_same_step(step, expected);
  }
}

}  // namespace

// First, and quick: most of what can be wrong shows here, and tests/simt/mutants/run goes no further then.
TEST_CASE("decode_attention: every plan") {
  generate_order(all_orders());
  check_with_plans(DecodeStep({.group = 4,
                               .slots = 40,
                               .dim = 8,
                               .length = 50,
                               .dtype = DType::kBFloat16,
                               .has_holes = true,
                               .has_entry = true,
                               .has_sinks = true}),
                   true);
  check_with_plans(DecodeStep({.batch = 1, .group = 9, .slots = 150, .dim = 12, .value_dim = 3, .length = 160}), true);
}

TEST_CASE("decode_attention: from the first token on") {
  const DType dtype = any_dtype();
  const int64_t length = GENERATE(0, 1, 19, 20, 21, 300);
  for (const bool has_entry : {false, true}) {
    check_with_plans(DecodeStep({.length = length, .dtype = dtype, .has_entry = has_entry}));
  }
}

TEST_CASE("decode_attention: head dimensions and groups") {
  const DType dtype = any_dtype();
  const auto [dim, value_dim, group] = GENERATE(table<int64_t, int64_t, int64_t>({{1, 1, 1},
                                                                                  {3, 7, 2},
                                                                                  {8, 16, 4},
                                                                                  {16, 8, 5},
                                                                                  {15, 17, 13},
                                                                                  {64, 64, 8},
                                                                                  {80, 65, 4},
                                                                                  {128, 128, 4},
                                                                                  {128, 64, 9},
                                                                                  {192, 128, 1},
                                                                                  {8, 600, 3},
                                                                                  {600, 8, 3}}));
  if (!is_fast() && dim + value_dim > 150) return;
  check_with_plans(
      DecodeStep({.heads = 1, .group = group, .dim = dim, .value_dim = value_dim, .dtype = dtype, .has_holes = true}));
}

TEST_CASE("decode_attention: logit rules") {
  const DType dtype = any_dtype();
  for (const double softcap : {0.0, 0.5, 30.0}) {
    for (const bool has_sinks : {false, true}) {
      check_with_plans(
          DecodeStep({.dim = 33, .dtype = dtype, .has_entry = true, .has_sinks = has_sinks, .softcap = softcap}));
    }
  }
}

// So far that an exponential is finite only below the largest logit of all runs.
TEST_CASE("decode_attention: logits far apart") {
  use_order(0);
  DecodeStep step({.slots = 30, .length = 45, .dtype = DType::kFloat64});
  for (int64_t i = 0; i < step.keys.size(); ++i) step.keys.set(i, 1000 * step.keys[i]);
  check_change(step, [](DecodeAttentionParams&) {});
}

TEST_CASE("decode_attention: rules of eviction, as the CPU has them") {
  use_order(0);
  DecodeStep step({.slots = 30, .length = GENERATE(12, 30, 45), .has_holes = GENERATE(false, true), .has_entry = true});
  SECTION("none of it") {
    check_change(step, [](DecodeAttentionParams& p) {
      p.value_weight = false, p.redundancy = 0, p.prior = 0, p.decay = 1, p.sink_tokens = p.recent_tokens = 0;
    });
  }
  SECTION("nothing protected: the new one goes for the norm of its value") {
    for (int64_t i = 0; i < step.new_values.size(); ++i) step.new_values.set(i, step.new_values[i] * 1e-3);
    check_change(step, [](DecodeAttentionParams& p) { p.sink_tokens = p.recent_tokens = 0; });
  }
  SECTION("literal sums in the entry") {
    check_change(step, [](DecodeAttentionParams& p) { p.skipped_mean = false; });
  }
  SECTION("an entry with nothing in it") {
    std::fill(step.skipped_count.begin(), step.skipped_count.end(), 0);
    check_change(step, [](DecodeAttentionParams&) {});
    check_change(step, [](DecodeAttentionParams& p) { p.skipped_mean = false; });
  }
  SECTION("everything protected: the oldest goes, or the new one") {
    check_change(step, [](DecodeAttentionParams& p) { p.recent_tokens = 1000; });
    check_change(step, [](DecodeAttentionParams& p) { p.sink_tokens = 44; });
  }
  SECTION("a new token that the user protects") {
    step.is_protected = {1, 0};
    check_change(step, [](DecodeAttentionParams&) {});
  }
  SECTION("a key that is not a number") {
    step.keys.set(4 * step.is.dim, std::nan(""));
    check_change(step, [](DecodeAttentionParams&) {});
  }
  SECTION("scores that are not finite, and ties") {
    const float scores[] = {kInf, kNaN, -kNaN, -kInf, 0.0f, -0.0f, 3e38f};
    for (size_t i = 0; i < size_t(step.rows); ++i) {
      if (step.positions[i] >= 0) step.facts[i] = scores[i % std::size(scores)];
    }
    check_change(step, [](DecodeAttentionParams&) {});
    for (float& score : step.facts) score = std::isnan(score) || score == -kInf ? score : kInf;
    check_change(step, [](DecodeAttentionParams&) {});
  }
}

// Every other row, KV head and slot of a larger step, from its first element on or from the second.
TEST_CASE("decode_attention: rows lie where the strides say") {
  use_order(0);
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  DecodeStep start({.batch = 4,
                    .heads = 4,
                    .slots = 40,
                    .value_dim = 16,
                    .length = 45,
                    .dtype = dtype,
                    .has_holes = true,
                    .has_entry = true});
  start.valid = {1, 0, 1, 1};
  start.is_protected = {0, 1, 1, 0};
  const int moved = GENERATE(range(0, 5));
  CAPTURE(int(dtype), moved);
  check_change(start, [&](DecodeAttentionParams& p) {
    p.batch = p.heads = 2;
    p.slots = 19;
    for (SlotRows* rows : {&p.keys, &p.values}) {
      rows->batch_stride *= 2, rows->head_stride *= 2, rows->slot_stride *= 2;
    }
    for (TokenInput* token : {&p.query, &p.new_keys, &p.new_values}) token->batch_stride *= 2, token->head_stride *= 2;
    p.fact_batch_stride *= 2, p.fact_head_stride *= 2;
    p.position_batch_stride *= 2, p.position_head_stride *= 2;
    p.seen_stride = p.valid_stride = p.protected_stride = 2;
    const auto move = [&](auto& of) {
      of.data = const_cast<char*>(static_cast<const char*>(of.data)) + element_size(dtype);
    };
    if (moved == 1) move(p.keys);
    if (moved == 2) move(p.values);
    if (moved == 3) move(p.new_keys);
    if (moved == 4) move(p.new_values);
  });
}

TEST_CASE("decode_attention: a padded row stays as it was") {
  use_order(1 % orders());
  const DType dtype = any_dtype();
  DecodeStep start(
      {.slots = 30, .length = GENERATE(0, 7, 30, 45), .dtype = dtype, .has_holes = true, .has_entry = true});
  start.valid = {0, 0};
  for (Numbers* numbers : {&start.query, &start.new_keys, &start.new_values, &start.output}) {
    for (int64_t i = 0; i < numbers->size(); ++i) numbers->set(i, std::nan(""));
  }
  for (const cuda::DecodePlan& plan : all_plans(start.in_use() + 1)) {
    DecodeStep step = start;
    decode_on_device(step, plan);
    REQUIRE(step.same_state(start));
    for (int64_t i = 0; i < step.output.size(); ++i) REQUIRE(step.output[i] == 0);
  }
  start.valid = {0, 1};
  const DecodeStep sound(start.is);
  start.query = sound.query, start.new_keys = sound.new_keys, start.new_values = sound.new_values;
  check_change(start, [](DecodeAttentionParams&) {});
}

TEST_CASE("decode_attention: whatever an empty slot holds does not count") {
  const DType dtype = any_dtype();
  DecodeStep clean({.slots = 40, .length = 50, .dtype = dtype, .has_holes = true});
  for (const cuda::DecodePlan& plan : {decode_plan(clean.params()), all_plans(41).front(), all_plans(41).back()}) {
    use_order(2 % orders());
    DecodeStep expected = clean;
    decode_on_device(expected, plan);
    for (const double junk : {std::nan(""), test::kInfinity, -test::kInfinity}) {
      DecodeStep step = clean;
      for (int64_t slot = 0; slot < step.rows; ++slot) {
        if (step.positions[size_t(slot)] >= 0) continue;
        for (int64_t d = 0; d < 8; ++d) step.keys.set(slot * 8 + d, junk), step.values.set(slot * 8 + d, junk);
        for (int64_t plane = kValueWeights; plane < kFacts; ++plane) {
          const size_t at = size_t(plane * (step.rows + 1) + slot);
          if (at < step.facts.size()) step.facts[at] = float(junk);
        }
      }
      decode_on_device(step, plan);
      REQUIRE(step.output == expected.output);
      REQUIRE(step.positions == expected.positions);
    }
  }
}

// 3 and 36 of them, in the memory of 2 heads with 20. What a head protects would go first, and does in the other head.
TEST_CASE("decode_attention: KV heads with slots of their own") {
  use_order(3 % orders());
  const DType dtype = any_dtype();
  const int64_t length = GENERATE(0, 4, 200);
  DecodeStep start({.batch = 1, .length = length, .dtype = dtype});
  start.layout = {0, 3, 1, 3, 4, 36, 5, 20};
  for (int64_t slot = 0; slot < start.rows; ++slot) {
    const int64_t first = slot < 4 ? 0 : 4, slots = slot < 4 ? 3 : 36;
    const int64_t in_use = std::min(length, slots), i = slot - first;
    const int64_t position = i < 5 ? i : length - in_use + i;
    const bool is_protected = position < 5 || position > length - 20;
    start.positions[size_t(slot)] = i < in_use ? int32_t(position) : -1;
    start.facts[size_t(slot)] = i >= in_use ? -kInf : is_protected ? 0 : 1.0f + float(slot % 7);
  }
  DecodeStep expected = start;
  DecodeAttentionParams params = expected.params();
  params.slots = 36;
  cpu::decode_attention(params, cpu::Sequential());
  for (const int64_t slots : {36, 41}) {  // of the largest, or no fewer
    for (const int64_t run_tokens : {1, 5, 36, 100}) {
      DecodeStep step = start;
      decode_on_device(step, {1, true, run_tokens}, [&](DecodeAttentionParams& p) { p.slots = slots; });
      require_same_step(step, expected);
    }
  }
}

TEST_CASE("decode_attention: the same bits on every run, and in whatever order blocks come") {
  const DecodeStep start({.slots = 70,
                          .dim = 24,
                          .length = 80,
                          .dtype = DType::kFloat16,
                          .has_holes = true,
                          .has_entry = true,
                          .has_sinks = true});
  for (const cuda::DecodePlan& plan : all_plans(71)) {
    use_order(0);
    DecodeStep expected = start;
    decode_on_device(expected, plan);
    for (int order = 0; order < orders(); ++order) {
      use_order(order);
      DecodeStep step = start;
      decode_on_device(step, plan);
      REQUIRE(step.output == expected.output);
      REQUIRE(step.same_state(expected));
    }
  }
}

TEST_CASE("decode_attention: by its own plan") {
  use_order(0);
  for (const int64_t length : {1, 200, 900}) {
    DecodeStep step({.group = 5, .slots = 600, .dim = 16, .length = length, .dtype = DType::kBFloat16});
    check(step, decode_plan(step.params()));
    if (!is_fast()) break;
  }
}

TEST_CASE("decode_attention: what cannot be launched is refused") {
  DecodeStep step({.dim = 16});
  const cuda::DecodePlan plan{1, false, step.in_use() + 1};
  const auto refuses = [&](const DecodeChange& change) {
    DecodeAttentionParams params = step.params();
    change(params);
    CHECK_THROWS(decode_attention(params, plan));
  };
  const auto off = [](auto*& address) {
    address = reinterpret_cast<std::remove_reference_t<decltype(address)>>(reinterpret_cast<uintptr_t>(address) + 1);
  };
  refuses([](DecodeAttentionParams& p) { p.batch = int64_t{1} << 31; });
  refuses([](DecodeAttentionParams& p) { p.length = int64_t{1} << 31; });  // the bits of `seen` for 2 heads
  refuses([&](DecodeAttentionParams& p) { off(p.keys.data); });
  refuses([&](DecodeAttentionParams& p) { off(p.new_values.data); });
  refuses([&](DecodeAttentionParams& p) { off(p.facts); });
  refuses([&](DecodeAttentionParams& p) { off(p.positions); });
  refuses([&](DecodeAttentionParams& p) { off(p.seen); });
  refuses([&](DecodeAttentionParams& p) { off(p.output); });
  DecodeStep longest = step;
  decode_on_device(longest, plan, [](DecodeAttentionParams& p) { p.length = (int64_t{1} << 31) - 1; });
  require_step(longest, step);
}
