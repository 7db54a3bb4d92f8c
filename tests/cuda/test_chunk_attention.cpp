// SPDX-License-Identifier: Apache-2.0
// chunk_attention on the device, kernels and the products between them, against its contract in double.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>

#include "chunk_case.h"

using namespace fsdc;
using namespace fsdc::test;

namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};

// Of outputs that are at most some 1 large: rounding of the exponentials and of the output itself.
double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-13;
    case DType::kFloat32:
      return 1e-6;
    case DType::kFloat16:
      return 2e-3;
    default:
      return 1.2e-2;
  }
}

// -1, or the first number that is further away than it may be; NaN where NaN is expected.
int64_t first_far(DType dtype, const Bytes& actual, const std::vector<double>& expected, double absolute,
                  double relative) {
  REQUIRE(int64_t(actual.size()) == int64_t(expected.size()) * element_size(dtype));
  for (int64_t i = 0; i < int64_t(expected.size()); ++i) {
    const double got = number_at(dtype, actual.data() + i * element_size(dtype)), wanted = expected[size_t(i)];
    if (std::isnan(wanted) ? std::isnan(got) : got == wanted) continue;
    if (!(std::abs(got - wanted) <= absolute + relative * std::abs(wanted))) {
      CAPTURE(got, wanted);
      UNSCOPED_INFO("got " << got << ", wanted " << wanted);
      return i;
    }
  }
  return -1;
}

Bytes part(const Bytes& bytes, int64_t first, int64_t count) {
  return {bytes.begin() + first * 4, bytes.begin() + (first + count) * 4};
}

struct ChunkResult {
  Bytes output, facts, lost;
  bool operator==(const ChunkResult&) const = default;
};

ChunkResult run(const ChunkCase& which, const ChunkArguments<Bytes>& host) {
  const std::vector<int32_t> layout = head_layout_of(which);
  ChunkArguments<DeviceMemory> device{
      DeviceMemory(host.query),        DeviceMemory(host.keys),           DeviceMemory(host.values),
      DeviceMemory(host.facts),        DeviceMemory(host.positions),      DeviceMemory(host.query_weights),
      DeviceMemory(host.carry),        DeviceMemory(host.sees),           DeviceMemory(host.sinks),
      DeviceMemory(host.skipped_keys), DeviceMemory(host.skipped_values), DeviceMemory(host.skipped_count),
      DeviceMemory(host.lost),         DeviceMemory(host.output)};
  chunk_attention(params_of(which, device, which.is_flat() ? layout.data() : nullptr), which.limits);
  return {device.output.copy(), device.facts.copy(), device.lost.copy()};
}

void check_chunk(const ChunkCase& which) {
  CAPTURE(which.batch, which.heads, which.group, which.queries, which.held, which.dim, which.value_dim,
          int(which.dtype), which.votes, which.weighs_queries, which.redundancy, which.masks_new, which.has_sinks,
          which.has_entry, which.has_mean_entry, which.has_holes, which.has_gaps, which.softcap, which.limits.queries,
          which.limits.logits);
  ChunkArguments<Bytes> host = arguments_of(which);
  const std::vector<int32_t> layout = head_layout_of(which);
  const ChunkAttentionParams params = params_of(which, host, which.is_flat() ? layout.data() : nullptr);
  const ChunkExpected expected = ChunkReference(which, params).expected();
  const ChunkResult found = run(which, host);

  const double tolerance = tolerance_of(which.dtype);
  CHECK(first_far(which.dtype, found.output, expected.output, tolerance, tolerance) == -1);
  if (which.has_entry) CHECK(first_far(DType::kFloat32, found.lost, expected.lost, 1e-6, 1e-5) == -1);
  const int64_t plane = which.batch * which.rows();
  if (!which.votes) {
    CHECK(found.facts == host.facts);
    return;
  }
  CHECK(first_far(DType::kFloat32, part(found.facts, 0, plane), expected.scores, 1e-6, 2e-6) == -1);
  CHECK(first_far(DType::kFloat32, part(found.facts, kRedundancyPlane * plane, plane), expected.redundancy, 1e-6,
                  2e-6) == -1);
  for (const int64_t other : {int64_t{1}, kKeyScalePlane}) {
    CHECK(part(found.facts, other * plane, plane) == part(host.facts, other * plane, plane));
  }
}

}  // namespace

// First, and quick: most of what can be wrong shows here, and tests/simt/mutants/run goes no further then.
TEST_CASE("chunk_attention: everything at once") {
  use_order(GENERATE(range(0, all_orders())));
  check_chunk({.held = {70},
               .weighs_queries = true,
               .masks_new = true,
               .has_sinks = true,
               .has_entry = true,
               .has_holes = true,
               .softcap = 1.5,
               .limits = {.queries = 4, .logits = 500}});
}

TEST_CASE("chunk_attention: sizes and types") {
  use_order(GENERATE(range(0, orders())));
  const DType dtype = GENERATE(from_range(kTypes));
  check_chunk({.dtype = dtype});
  check_chunk(
      {.batch = 1, .heads = 1, .group = 1, .queries = 1, .held = {0}, .dim = 1, .value_dim = 1, .dtype = dtype});
  check_chunk({.batch = 1, .group = 3, .queries = 70, .held = {0}, .dtype = dtype});
  check_chunk({.batch = 1, .heads = 1, .group = 5, .queries = 3, .held = {1100}, .dim = 3, .dtype = dtype});
  check_chunk({.dim = 0, .dtype = dtype});
  check_chunk({.value_dim = 0, .dtype = dtype});
}

TEST_CASE("chunk_attention: options") {
  use_order(GENERATE(range(0, orders())));
  const DType dtype = GENERATE(from_range(kTypes));
  check_chunk({.dtype = dtype, .votes = false});
  check_chunk({.dtype = dtype, .weighs_queries = true, .redundancy = false});
  check_chunk({.dtype = dtype, .masks_new = true});
  check_chunk({.dtype = dtype, .has_sinks = true});
  check_chunk({.dtype = dtype, .has_entry = true});
  check_chunk({.dtype = dtype, .has_entry = true, .has_mean_entry = false});
  check_chunk({.dtype = dtype, .has_holes = true});
  check_chunk({.dtype = dtype, .softcap = 2});
  check_chunk({.dtype = dtype, .has_gaps = true});
  check_chunk({.dtype = dtype, .weighs_queries = true, .has_holes = true, .has_gaps = true});
}

TEST_CASE("chunk_attention: heads that hold different numbers of tokens") {
  use_order(GENERATE(range(0, orders())));
  const DType dtype = GENERATE(DType::kFloat32, DType::kBFloat16);
  for (const bool has_holes : {false, true}) {
    check_chunk({.heads = 3, .held = {0, 90, 33}, .dtype = dtype, .has_entry = true, .has_holes = has_holes});
    check_chunk({.heads = 2,
                 .held = {130, 1},
                 .dtype = dtype,
                 .masks_new = true,
                 .has_holes = has_holes,
                 .limits = {.queries = 5, .logits = 300}});
  }
}

TEST_CASE("chunk_attention: blocks of any size") {
  use_order(GENERATE(range(0, orders())));
  for (const int64_t queries : {1, 2, 9, 128}) {
    for (const int64_t logits : {1, 100, 250, 1000}) {
      check_chunk({.weighs_queries = true, .has_entry = true, .limits = {queries, logits}});
      check_chunk({.has_holes = true, .has_gaps = true, .limits = {queries, logits}});
    }
  }
}

TEST_CASE("chunk_attention: a query that sees nothing") {
  ChunkCase which{.queries = 6, .held = {0}, .has_sinks = true, .has_entry = true, .has_holes = true};
  ChunkArguments<Bytes> host = arguments_of(which);
  std::vector<int32_t> positions(size_t(which.batch * which.rows()), -1);
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = i % 6 < 3 ? -1 : 1;
  host.positions = to_bytes(positions);
  host.values = random_elements(which.dtype, which.batch * which.rows() * which.value_dim, 3);
  host.keys = random_elements(which.dtype, which.batch * which.rows() * which.dim, 3);
  const ChunkResult found = run(which, host);
  const int64_t of_query = which.value_dim * 4;
  for (int64_t head = 0; head < which.batch * which.heads * which.group; ++head) {
    const auto first = found.output.begin() + head * 6 * of_query;
    CAPTURE(head, number_at(which.dtype, &*first));
    CHECK(std::all_of(first, first + 3 * of_query, [](char byte) { return byte == 0; }));
    CHECK(std::any_of(first + 3 * of_query, first + 4 * of_query, [](char byte) { return byte != 0; }));
  }
}

TEST_CASE("chunk_attention: NaN spreads as in a softmax") {
  const ChunkCase which{.batch = 1, .heads = 1, .group = 1, .queries = 4, .held = {5}, .redundancy = false};
  ChunkArguments<Bytes> host = arguments_of(which);
  store(which.dtype, kNaN, host.query.data() + which.dim * 4);     // of query 1
  store(which.dtype, kNaN, host.keys.data() + 7 * which.dim * 4);  // of new token 2: queries before do not see it
  const ChunkResult found = run(which, host);
  for (int64_t query = 0; query < 4; ++query) {
    const float out = float(number_at(which.dtype, found.output.data() + query * which.value_dim * 4));
    CAPTURE(query, out);
    CHECK(std::isfinite(out) == (query == 0));
  }
}

TEST_CASE("chunk_attention: the same bits in every order") {
  const ChunkCase which{.held = {90}, .has_entry = true, .has_holes = true, .limits = {.queries = 5, .logits = 1500}};
  const ChunkArguments<Bytes> host = arguments_of(which);
  use_order(0);
  const ChunkResult first = run(which, host);
  for (int order = 0; order < orders(); ++order) {
    use_order(order);
    CHECK(run(which, host) == first);
  }
}

TEST_CASE("chunk_attention: nothing to do") {
  check_chunk({.queries = 0});
  check_chunk({.batch = 0});
  check_chunk({.heads = 0});
}
