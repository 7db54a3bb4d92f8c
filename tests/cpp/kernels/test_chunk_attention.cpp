// SPDX-License-Identifier: Apache-2.0
// chunk_attention on every instruction set of this machine, against loops in double; threads; what it may not read.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/element.h"
#include "threads.h"

namespace {

using namespace fsdc;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kPlanes = 4;

// What is attended to is in vectors of exactly the sizes needed, so that a sanitizer sees any read past them.
template <class T>
struct Chunk {
  int64_t batch, heads, group, held, queries, dim, value_dim;
  std::vector<T> query, keys, values, output;
  std::vector<float> facts;
  std::vector<int32_t> positions;

  Chunk(int64_t batch, int64_t heads, int64_t group, int64_t held, int64_t queries, int64_t dim, int64_t value_dim)
      : batch(batch), heads(heads), group(group), held(held), queries(queries), dim(dim), value_dim(value_dim) {
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<T>& to, int64_t size) {
      to.resize(size);
      for (T& x : to) {
        if constexpr (std::is_same_v<T, double>) {
          x = normal(generator);
        } else {
          x = cpu::convert<T>(normal(generator));
        }
      }
    };
    fill(query, batch * heads * group * queries * dim);
    fill(keys, batch * heads * tokens() * dim);
    fill(values, batch * heads * tokens() * value_dim);
    output.resize(batch * heads * group * queries * value_dim);
    facts.assign(kPlanes * batch * heads * tokens(), 0.25f);
    positions.assign(batch * heads * tokens(), 1);
    for (size_t i = 0; i < positions.size(); ++i) {
      if (generator() % 5 != 0) continue;
      positions[i] = -1;
      for (int64_t d = 0; d < dim; ++d) keys[i * dim + d] = cpu::convert<T>(Wide(kNaN));
      for (int64_t d = 0; d < value_dim; ++d) values[i * value_dim + d] = cpu::convert<T>(Wide(kNaN));
    }
  }

  using Wide = cpu::Accumulator<T>;
  int64_t tokens() const { return held + queries; }

  ChunkAttentionParams params() {
    const int64_t s = tokens();
    return {.batch = batch,
            .heads = heads,
            .group = group,
            .queries = queries,
            .held = held,
            .dtype = std::is_same_v<T, double>          ? DType::kFloat64
                     : std::is_same_v<T, cpu::Float16>  ? DType::kFloat16
                     : std::is_same_v<T, cpu::BFloat16> ? DType::kBFloat16
                                                        : DType::kFloat32,
            .head_layout = nullptr,
            .query = {query.data(), heads * group * queries * dim, queries * dim, dim, dim},
            .keys = {keys.data(), heads * s * dim, s * dim, dim, dim},
            .values = {values.data(), heads * s * value_dim, s * value_dim, value_dim, value_dim},
            .facts = facts.data(),
            .fact_plane_stride = batch * heads * s,
            .fact_batch_stride = heads * s,
            .fact_head_stride = s,
            .positions = positions.data(),
            .position_batch_stride = heads * s,
            .position_head_stride = s,
            .query_weights = nullptr,
            .query_weight_batch_stride = 0,
            .query_weight_query_stride = 0,
            .carry = nullptr,
            .carry_stride = 0,
            .redundancy = true,
            .sees = nullptr,
            .sees_batch_stride = 0,
            .sees_query_stride = 0,
            .sees_token_stride = 0,
            .scaling = 0.5,
            .softcap = 0,
            .sinks = nullptr,
            .sinks_dtype = DType::kFloat32,
            .skipped_keys = nullptr,
            .skipped_values = nullptr,
            .skipped_count = nullptr,
            .lost = nullptr,
            .skipped_mean = true,
            .output = output.data()};
  }
};

template <class T>
double number(T x) {
  return cpu::convert<cpu::Accumulator<T>>(x);
}

template <class T>
double dot(const T* a, const T* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += number(a[d]) * number(b[d]);
  return sum;
}

// The contract of kernels/chunk_attention.h, one number at a time.
template <class T>
void check(cpu::Isa isa, int64_t group, int64_t held, int64_t queries, int64_t dim, int64_t value_dim,
           double tolerance) {
  CAPTURE(cpu::name_of(isa), group, held, queries, dim, value_dim);
  Chunk<T> chunk(2, 2, group, held, queries, dim, value_dim);
  cpu::chunk_attention(chunk.params(), test::Threads(3), isa);
  const int64_t tokens = chunk.tokens(), rows = 4;
  for (int64_t row = 0; row < rows; ++row) {
    const T* keys = chunk.keys.data() + row * tokens * dim;
    const T* values = chunk.values.data() + row * tokens * value_dim;
    const int32_t* positions = chunk.positions.data() + row * tokens;
    std::vector<double> votes(tokens, 0.25);
    for (int64_t lane = 0; lane < group * queries; ++lane) {
      const int64_t g = lane / queries, q = lane % queries;
      const T* query = chunk.query.data() + ((row * group + g) * queries + q) * dim;
      std::vector<double> weights(tokens, 0.0);
      double sum = 0;
      for (int64_t j = 0; j <= held + q; ++j) {
        if (positions[j] >= 0) sum += weights[j] = std::exp(0.5 * dot(query, keys + j * dim, dim));
      }
      for (int64_t j = 0; j < tokens && sum > 0; ++j) votes[j] += weights[j] / sum;
      for (int64_t d = 0; d < value_dim; ++d) {
        double expected = 0;
        for (int64_t j = 0; j < tokens; ++j) {
          if (weights[j] > 0) expected += weights[j] / sum * number(values[j * value_dim + d]);
        }
        const double got = number(chunk.output[((row * group + g) * queries + q) * value_dim + d]);
        if (std::abs(got - expected) > tolerance) {
          CAPTURE(row, g, q, d, got, expected);
          FAIL_CHECK("the output differs");
          return;
        }
      }
    }
    for (int64_t j = 0; j < tokens; ++j) {
      CAPTURE(row, j);
      REQUIRE_THAT(chunk.facts[row * tokens + j], Catch::Matchers::WithinAbs(votes[j], 1e-4));
      double redundancy = 0.25;  // keys are not of length 1 here: their scale is 0.25, whatever they are
      for (int64_t i = std::max(held, j + 1); i < tokens && positions[j] >= 0; ++i) {
        if (positions[i] >= 0) redundancy = std::max(redundancy, dot(keys + i * dim, keys + j * dim, dim) / 16);
      }
      REQUIRE_THAT(chunk.facts[2 * rows * tokens + row * tokens + j], Catch::Matchers::WithinAbs(redundancy, 1e-4));
    }
  }
}

}  // namespace

TEST_CASE("attention, votes and redundancy of a chunk") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  for (const auto& [group, held, queries, dim, value_dim] : std::vector<std::array<int64_t, 5>>{
           {1, 0, 1, 1, 1}, {4, 0, 90, 64, 64}, {3, 70, 23, 32, 48}, {7, 129, 31, 40, 5}}) {
    check<float>(isa, group, held, queries, dim, value_dim, 2e-5);
    check<double>(isa, group, held, queries, dim, value_dim, 1e-12);
    check<cpu::BFloat16>(isa, group, held, queries, dim, value_dim, 3e-2);
    check<cpu::Float16>(isa, group, held, queries, dim, value_dim, 3e-3);
  }
}

TEST_CASE("threads change nothing in a chunk") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  Chunk<float> expected(1, 3, 4, 50, 120, 24, 24);
  cpu::chunk_attention(expected.params(), cpu::Sequential(), isa);
  for (int threads : {2, 3, 7}) {
    Chunk<float> chunk(1, 3, 4, 50, 120, 24, 24);
    cpu::chunk_attention(chunk.params(), test::Threads(threads), isa);
    CHECK(chunk.output == expected.output);
    CHECK(chunk.facts == expected.facts);
  }
}
