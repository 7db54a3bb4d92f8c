// SPDX-License-Identifier: Apache-2.0
// One step of decode_attention with memory of its own, and what must come of it: slow, obvious, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/element.h"
#include "kernels/decode_attention.h"

namespace fsdc::test {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Numbers of one of the four types, in memory that ends with the last of them: a sanitizer sees who reads on.
class Numbers {
 public:
  Numbers(DType dtype, int64_t count) : dtype_(dtype), bytes_(count * element_size(dtype)) {}

  int64_t size() const { return int64_t(bytes_.size()) / element_size(dtype_); }
  DType dtype() const { return dtype_; }
  char* data() { return bytes_.data(); }
  bool operator==(const Numbers& other) const { return bytes_ == other.bytes_; }

  double operator[](int64_t i) const {
    double number = 0;
    cpu::with_element_type(dtype_, [&](auto element) {
      std::memcpy(&element, bytes_.data() + i * int64_t(sizeof(element)), sizeof(element));
      number = cpu::convert<cpu::Accumulator<decltype(element)>>(element);
    });
    return number;
  }

  void set(int64_t i, double number) {
    cpu::with_element_type(dtype_, [&](auto element) {
      using T = decltype(element);
      element = cpu::convert<T>(static_cast<cpu::Accumulator<T>>(number));
      std::memcpy(bytes_.data() + i * int64_t(sizeof(element)), &element, sizeof(element));
    });
  }

  void fill(std::mt19937& generator, double scale = 1) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size(); ++i) set(i, scale * normal(generator));
  }

 private:
  DType dtype_;
  std::vector<char> bytes_;
};

struct DecodeShape {
  int64_t batch = 2, heads = 2, group = 3, slots = 20, dim = 8, value_dim = 8, length = 25;
  DType dtype = DType::kFloat32;
  bool has_holes = false, has_entry = false, has_sinks = false;
  double softcap = 0;
};

struct DecodeStep {
  explicit DecodeStep(const DecodeShape& shape)
      : is(shape),
        rows((is.slots + 1) * is.heads * is.batch - 1),  // the last free slot is not there: nobody may touch it
        query(is.dtype, is.batch * is.heads * is.group * is.dim),
        new_keys(is.dtype, is.batch * is.heads * is.dim),
        new_values(is.dtype, is.batch * is.heads * is.value_dim),
        keys(is.dtype, rows * is.dim),
        values(is.dtype, rows * is.value_dim),
        sinks(is.dtype, is.heads * is.group),
        output(is.dtype, is.batch * is.heads * is.group * is.value_dim),
        skipped_keys(wide(), is.batch * is.heads * is.dim),
        skipped_values(wide(), is.batch * is.heads * is.value_dim),
        facts(kFacts * (rows + 1) - 1),
        positions(rows, -1),
        seen(is.batch, 0),
        skipped_count(is.batch * is.heads, 3),
        lost(is.batch * is.heads),
        valid(is.batch, 1) {
    std::mt19937 generator(1);
    std::uniform_real_distribution<float> uniform;
    for (Numbers* numbers : {&query, &new_keys, &new_values, &keys, &values, &sinks}) numbers->fill(generator);
    skipped_keys.fill(generator, 3);
    skipped_values.fill(generator, 3);
    for (float& fact : facts) fact = uniform(generator);
    for (int64_t row = 0; row < is.batch * is.heads; ++row) {
      for (int64_t j = 0; j < is.slots; ++j) {
        const bool is_empty = j >= in_use() || (is.has_holes && (j * 7 + row / is.heads) % 5 == 0);
        if (is_empty) fact(kScores, row, j) = -std::numeric_limits<float>::infinity();
        if (!is_empty) positions[at(row, j)] = int32_t((j * 13 + 7) % in_use());  // slots are not in token order
      }
    }
    for (int32_t& tokens : seen) tokens = int32_t(is.length);
  }

  DType wide() const { return is.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  int64_t in_use() const { return std::min(is.length, is.slots); }
  int64_t at(int64_t row, int64_t slot) const { return row * (is.slots + 1) + slot; }
  float& fact(int64_t plane, int64_t row, int64_t slot) { return facts[plane * (rows + 1) + at(row, slot)]; }

  DecodeAttentionParams params() {
    const int64_t row = is.slots + 1;
    return {.batch = is.batch,
            .heads = is.heads,
            .group = is.group,
            .length = is.length,
            .slots = is.slots,
            .dtype = is.dtype,
            .heads_layout = layout.empty() ? nullptr : layout.data(),
            .layout_rows = layout.empty() ? 0 : rows + 1,
            .sink_tokens = 1,
            .recent_tokens = 3,
            .query = {query.data(), is.heads * is.group * is.dim, is.dim},
            .new_keys = {new_keys.data(), is.heads * is.dim, is.dim},
            .new_values = {new_values.data(), is.heads * is.value_dim, is.value_dim},
            .keys = {keys.data(), is.heads * row * is.dim, row * is.dim, is.dim, is.dim},
            .values = {values.data(), is.heads * row * is.value_dim, row * is.value_dim, is.value_dim, is.value_dim},
            .facts = facts.data(),
            .fact_plane_stride = rows + 1,
            .fact_batch_stride = is.heads * row,
            .fact_head_stride = row,
            .positions = positions.data(),
            .position_batch_stride = is.heads * row,
            .position_head_stride = row,
            .seen = seen.data(),
            .seen_stride = 1,
            .valid = reinterpret_cast<const bool*>(valid.data()),
            .valid_stride = 1,
            .is_protected = is_protected.empty() ? nullptr : reinterpret_cast<const bool*>(is_protected.data()),
            .protected_stride = 1,
            .scaling = 1 / std::sqrt(double(is.dim)),
            .softcap = is.softcap,
            .sinks = is.has_sinks ? sinks.data() : nullptr,
            .sinks_dtype = is.dtype,
            .decay = 0.75f,
            .prior = 0.125f,
            .value_weight = true,
            .redundancy = 0.5f,
            .skipped_keys = is.has_entry ? skipped_keys.data() : nullptr,
            .skipped_values = is.has_entry ? skipped_values.data() : nullptr,
            .skipped_count = is.has_entry ? skipped_count.data() : nullptr,
            .lost = is.has_entry ? lost.data() : nullptr,
            .skipped_mean = true,
            .output = output.data()};
  }

  bool same_state(const DecodeStep& other) const {
    const auto same = [](const auto& one, const auto& two) {  // NaN equals itself here
      return std::memcmp(one.data(), two.data(), one.size() * sizeof(one[0])) == 0;
    };
    return keys == other.keys && values == other.values && skipped_keys == other.skipped_keys &&
           skipped_values == other.skipped_values && same(facts, other.facts) && positions == other.positions &&
           seen == other.seen && skipped_count == other.skipped_count && same(lost, other.lost);
  }

  DecodeShape is;
  int64_t rows;
  Numbers query, new_keys, new_values, keys, values, sinks, output, skipped_keys, skipped_values;
  std::vector<float> facts;
  std::vector<int32_t> positions, seen, skipped_count;
  std::vector<float> lost;
  std::vector<char> valid, is_protected;  // read as bool, which std::vector would pack
  std::vector<int32_t> layout;
};

// What must come of one (batch, KV head) of a step.
struct ExpectedRow {
  std::vector<double> output;      // [G, Dv]
  std::vector<double> scores;      // [T + 1], the new token's last; -inf of an empty slot
  std::vector<double> redundancy;  // [T]
  int64_t slot = 0;                // the new token's; N: it is the one that goes
};

inline ExpectedRow expected_row(DecodeStep& step, int64_t row) {
  const DecodeShape& is = step.is;
  const DecodeAttentionParams p = step.params();
  const int64_t T = step.in_use();
  ExpectedRow expected{std::vector<double>(is.group * is.value_dim), std::vector<double>(T + 1), std::vector<double>(T),
                       T};
  const auto is_held = [&](int64_t j) { return j == T || step.positions[step.at(row, j)] >= 0; };
  const auto key = [&](int64_t j, int64_t d) {
    return j == T ? step.new_keys[row * is.dim + d] : step.keys[step.at(row, j) * is.dim + d];
  };
  const auto value = [&](int64_t j, int64_t d) {
    return j == T ? step.new_values[row * is.value_dim + d] : step.values[step.at(row, j) * is.value_dim + d];
  };
  const auto length_of = [](int64_t dim, const auto& number) {
    double squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += number(d) * number(d);
    return std::sqrt(squares);
  };
  const double n = step.skipped_count[row];
  std::vector<double> votes(T + 1);
  for (int64_t g = 0; g < is.group; ++g) {
    const auto logit_of = [&](const auto& number) {
      double sum = 0;
      for (int64_t d = 0; d < is.dim; ++d) sum += step.query[(row * is.group + g) * is.dim + d] * number(d);
      return is.softcap == 0 ? sum * p.scaling : is.softcap * std::tanh(sum * p.scaling / is.softcap);
    };
    std::vector<double> weights(T + 1);
    double sum = is.has_sinks ? std::exp(step.sinks[row % is.heads * is.group + g]) : 0;
    const double entry =
        is.has_entry ? n * std::exp(logit_of([&](int64_t d) { return step.skipped_keys[row * is.dim + d] / n; })) : 0;
    for (int64_t j = 0; j <= T; ++j) {
      if (is_held(j)) weights[j] = std::exp(logit_of([&](int64_t d) { return key(j, d); }));
      sum += weights[j];
    }
    sum += entry;
    for (int64_t j = 0; j <= T; ++j) votes[j] += weights[j] / sum;
    for (int64_t d = 0; d < is.value_dim; ++d) {
      double& out = expected.output[g * is.value_dim + d];
      if (is.has_entry) out = entry / sum * step.skipped_values[row * is.value_dim + d] / n;
      for (int64_t j = 0; j <= T; ++j) {
        if (is_held(j)) out += weights[j] / sum * value(j, d);
      }
    }
  }

  const double new_length = length_of(is.dim, [&](int64_t d) { return key(T, d); });
  double least = kInfinity;
  int32_t least_position = std::numeric_limits<int32_t>::max();
  for (int64_t j = 0; j <= T; ++j) {
    double old = 0, redundancy = 0, weight = 0;
    int32_t position = step.seen[row / is.heads];
    if (j == T) {
      weight = length_of(is.value_dim, [&](int64_t d) { return value(T, d); });
    } else {
      old = step.fact(kScores, row, j), weight = step.fact(kValueWeights, row, j);
      position = step.positions[step.at(row, j)];
      double product = 0;
      for (int64_t d = 0; d < is.dim; ++d) product += key(j, d) * key(T, d) / new_length;
      redundancy = std::max<double>(step.fact(kRedundancy, row, j), product * step.fact(kKeyScales, row, j));
      expected.redundancy[j] = redundancy;
    }
    expected.scores[j] = std::isfinite(old) ? p.decay * old + votes[j] : old;
    const bool is_kept = position < p.sink_tokens || position > step.seen[row / is.heads] - p.recent_tokens;
    const double eviction =
        position < 0 ? -kInfinity
        : is_kept    ? kInfinity
                     : (expected.scores[j] + p.prior * double(is.group)) * weight * (1 - p.redundancy * redundancy);
    if (T == is.slots && (eviction < least || (eviction == least && position < least_position))) {
      least = eviction, least_position = position, expected.slot = j;
    }
  }
  return expected;
}

}  // namespace fsdc::test
