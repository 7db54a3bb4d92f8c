// SPDX-License-Identifier: Apache-2.0
// One call of chunk_attention: its arguments, and what it must give, by the contract one number at a time in double.
#pragma once

#include <algorithm>
#include <numeric>

#include "host_products.h"
#include "kernels/chunk_attention.h"
#include "kernels/cuda/chunk_attention/plan.h"

namespace fsdc::test {

struct ChunkCase {
  int64_t batch = 2, heads = 2, group = 2, queries = 9;
  std::vector<int64_t> held = {20};  // of all heads, or of each
  int64_t dim = 8, value_dim = 6;
  DType dtype = DType::kFloat32;
  bool votes = true, weighs_queries = false, redundancy = true, masks_new = false, has_sinks = false;
  bool has_entry = false, has_mean_entry = true, has_holes = false, has_gaps = false;
  double softcap = 0;
  cuda::ChunkLimits limits = {};

  bool is_flat() const { return held.size() > 1; }
  int64_t held_by(int64_t head) const { return held[is_flat() ? size_t(head) : 0]; }
  int64_t tokens() const { return *std::max_element(held.begin(), held.end()) + queries; }
  int64_t rows() const {  // of tokens, in all heads
    return is_flat() ? std::accumulate(held.begin(), held.end(), heads * queries) : heads * tokens();
  }
  // Where the vectors lie of the token that is the i-th of [B, H, S].
  int64_t place_of(int64_t i) const {
    if (!has_gaps || is_flat()) return i;
    const int64_t b = i / rows(), h = i % rows() / tokens(), j = i % tokens();
    return (b * tokens() + j) * heads + h;
  }
  int64_t gap() const { return has_gaps ? 5 : 0; }
  DType wide() const { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
};

// Everything an operator is given, as bytes: of the host, or with DeviceMemory in place of Bytes of the device.
template <class Memory>
struct ChunkArguments {
  Memory query, keys, values, facts, positions, query_weights, carry, sees, sinks;
  Memory skipped_keys, skipped_values, skipped_count, lost, output;
};

inline Bytes random_bytes(int64_t count, int most, uint32_t seed) {
  std::mt19937 generator(seed);
  Bytes bytes(static_cast<size_t>(count));
  for (char& byte : bytes) byte = char(int(generator() % uint32_t(most)));
  return bytes;
}

// What is not there is NaN, and a query without weight is too.
inline ChunkArguments<Bytes> arguments_of(const ChunkCase& which) {
  const int64_t B = which.batch, H = which.heads, tokens = B * which.rows(),
                lanes = B * H * which.group * which.queries;
  const int64_t key_width = which.dim + which.gap(), value_width = which.value_dim + which.gap();
  ChunkArguments<Bytes> made{.query = random_elements(which.dtype, lanes * key_width, 1),
                             .keys = random_elements(which.dtype, tokens * key_width, 2),
                             .values = random_elements(which.dtype, tokens * value_width, 3),
                             .facts = {},
                             .positions = {},
                             .query_weights = random_elements(DType::kFloat32, B * which.queries, 5),
                             .carry = random_elements(DType::kFloat32, B, 6),
                             .sees = random_bytes(B * which.queries * which.queries, 2, 7),
                             .sinks = random_elements(DType::kBFloat16, H * which.group, 8),
                             .skipped_keys = random_elements(which.wide(), B * H * which.dim, 9),
                             .skipped_values = random_elements(which.wide(), B * H * which.value_dim, 10),
                             .skipped_count = {},
                             .lost = Bytes(size_t(B * H) * sizeof(float), 0x11),
                             .output = Bytes(size_t(lanes * which.value_dim * element_size(which.dtype)), 0x11)};
  std::vector<float> facts(size_t(4 * tokens), 0.25f);
  std::iota(facts.begin(), facts.begin() + tokens, 0.0f);
  std::fill(facts.begin() + kRedundancyPlane * tokens, facts.begin() + (kRedundancyPlane + 1) * tokens, 0.05f);
  std::fill(facts.begin() + kKeyScalePlane * tokens, facts.end(), 0.5f);
  const float special[] = {kInf, -kInf, kNaN};
  for (size_t i = 0; i < 3 && int64_t(i) < tokens; ++i) facts[i * 7 % size_t(tokens)] = special[i];
  made.facts = to_bytes(facts);
  std::vector<int32_t> counts(size_t(B * H)), positions(static_cast<size_t>(tokens), 1);
  for (size_t i = 0; i < counts.size(); ++i) counts[i] = int32_t(i % 3);  // 0: no token has gone yet
  made.skipped_count = to_bytes(counts);
  std::mt19937 generator(11);
  for (size_t i = 0; i < positions.size(); ++i) {
    if (!which.has_holes || generator() % 4 != 0) continue;
    positions[i] = -1;
    const int64_t size = element_size(which.dtype), at = which.place_of(int64_t(i));
    for (int64_t d = 0; d < key_width; ++d) store(which.dtype, kNaN, made.keys.data() + (at * key_width + d) * size);
    for (int64_t d = 0; d < value_width; ++d) {
      store(which.dtype, kNaN, made.values.data() + (at * value_width + d) * size);
    }
  }
  made.positions = to_bytes(positions);
  if (B > 0) std::memset(made.carry.data(), 0, sizeof(float));  // as it becomes in a long chunk
  if (which.weighs_queries) {                                   // the second query of the first batch row
    std::memset(made.query_weights.data() + (which.queries > 1 ? sizeof(float) : 0), 0, sizeof(float));
    const int64_t size = element_size(which.dtype), query = std::min<int64_t>(1, which.queries - 1);
    for (int64_t head = 0; head < H * which.group; ++head) {
      const int64_t at = which.has_gaps ? (query * H * which.group + head) : (head * which.queries + query);
      for (int64_t d = 0; d < key_width; ++d) store(which.dtype, kNaN, made.query.data() + (at * key_width + d) * size);
    }
  }
  return made;
}

template <class Memory>
ChunkAttentionParams params_of(const ChunkCase& which, ChunkArguments<Memory>& at, const int32_t* head_layout) {
  const int64_t H = which.heads, Q = which.queries, rows = which.rows(), S = which.tokens();
  const int64_t query_heads = H * which.group;
  // With gaps as [B, tokens, heads, dim + gap], so that rows are not even.
  const auto vectors = [&](Memory& memory, int64_t heads, int64_t tokens, int64_t dim) -> TokenVectors {
    const int64_t width = dim + which.gap();
    if (which.has_gaps) return {memory.data(), heads * tokens * width, width, heads * width, dim};
    return {memory.data(), heads * tokens * width, tokens * width, width, dim};
  };
  const auto tokens_of = [&](Memory& memory, int64_t dim) -> TokenVectors {
    if (which.is_flat()) return {memory.data(), rows * (dim + which.gap()), 0, dim + which.gap(), dim};
    return vectors(memory, H, S, dim);
  };
  const auto given = [](bool is_given, Memory& memory) { return is_given ? memory.data() : nullptr; };
  return {.batch = which.batch,
          .heads = H,
          .group = which.group,
          .queries = Q,
          .held = S - Q,
          .dtype = which.dtype,
          .head_layout = head_layout,
          .query = vectors(at.query, query_heads, Q, which.dim),
          .keys = tokens_of(at.keys, which.dim),
          .values = tokens_of(at.values, which.value_dim),
          .facts = reinterpret_cast<float*>(given(which.votes, at.facts)),
          .fact_plane_stride = which.batch * rows,
          .fact_batch_stride = rows,
          .fact_head_stride = which.is_flat() ? 0 : S,
          .positions = reinterpret_cast<const int32_t*>(given(which.has_holes, at.positions)),
          .position_batch_stride = rows,
          .position_head_stride = which.is_flat() ? 0 : S,
          .query_weights = reinterpret_cast<const float*>(given(which.weighs_queries, at.query_weights)),
          .query_weight_batch_stride = Q,
          .query_weight_query_stride = 1,
          .carry = reinterpret_cast<const float*>(given(which.weighs_queries, at.carry)),
          .carry_stride = 1,
          .redundancy = which.votes && which.redundancy,
          .sees = reinterpret_cast<const bool*>(given(which.masks_new, at.sees)),
          .sees_batch_stride = Q * Q,
          .sees_query_stride = 1,  // a transposed mask: neighbours are queries
          .sees_token_stride = Q,
          .scaling = 0.7,
          .softcap = which.softcap,
          .sinks = given(which.has_sinks, at.sinks),
          .sinks_dtype = DType::kBFloat16,
          .skipped_keys = given(which.has_entry, at.skipped_keys),
          .skipped_values = given(which.has_entry, at.skipped_values),
          .skipped_count = reinterpret_cast<const int32_t*>(given(which.has_entry, at.skipped_count)),
          .lost = reinterpret_cast<float*>(given(which.has_entry, at.lost)),
          .skipped_mean = which.has_mean_entry,
          .output = at.output.data()};
}

// Per head {its first row, tokens held}.
inline std::vector<int32_t> head_layout_of(const ChunkCase& which) {
  std::vector<int32_t> layout;
  int64_t first = 0;
  for (int64_t head = 0; which.is_flat() && head < which.heads; ++head) {
    layout.insert(layout.end(), {int32_t(first), int32_t(which.held_by(head))});
    first += which.held_by(head) + which.queries;
  }
  return layout;
}

// ---- the contract -----------------------------------------------------------------------------------------------------

struct ChunkExpected {
  std::vector<double> output, scores, redundancy, lost;
};

class ChunkReference {
 public:
  // Of parameters with pointers of the host, which are not written.
  ChunkReference(const ChunkCase& which, const ChunkAttentionParams& params) : which_(which), p_(params) {
    const int64_t lanes = p_.batch * p_.heads * p_.group * p_.queries;
    expected_.output.resize(size_t(lanes * p_.values.dim));
    if (p_.facts != nullptr) {
      const float* const facts = p_.facts;
      expected_.scores.assign(facts, facts + p_.batch * which.rows());
      const float* const old = facts + kRedundancyPlane * p_.fact_plane_stride;
      expected_.redundancy.assign(old, old + p_.batch * which.rows());
    }
    if (p_.lost != nullptr) expected_.lost.resize(size_t(p_.batch * p_.heads));
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t h = 0; h < p_.heads; ++h) attend(b, h);
    }
  }

  const ChunkExpected& expected() const { return expected_; }

 private:
  int64_t first_row(int64_t h) const { return p_.head_layout != nullptr ? p_.head_layout[2 * h] : 0; }
  // Where a fact of a token of a head lies.
  size_t place(int64_t b, int64_t h, int64_t j) const {
    return size_t(b * p_.fact_batch_stride + h * p_.fact_head_stride + first_row(h) + j);
  }
  double at(const TokenVectors& of, int64_t b, int64_t h, int64_t token, int64_t d) const {
    const int64_t offset = b * of.batch_stride + h * of.head_stride + token * of.token_stride + d;
    return number_at(p_.dtype, static_cast<const char*>(of.data) + offset * element_size(p_.dtype));
  }
  double wide_at(const void* of, int64_t i) const {
    return number_at(which_.wide(), static_cast<const char*>(of) + i * element_size(which_.wide()));
  }
  double key(int64_t b, int64_t h, int64_t j, int64_t d) const { return at(p_.keys, b, h, first_row(h) + j, d); }
  bool is_there(int64_t b, int64_t h, int64_t j) const {
    return p_.positions == nullptr || p_.positions[place(b, h, j)] >= 0;
  }
  bool sees(int64_t b, int64_t h, int64_t q, int64_t j) const {
    const int64_t held = which_.held_by(h);
    if (!is_there(b, h, j)) return false;
    if (j < held) return true;
    if (p_.sees == nullptr) return j - held <= q;
    return p_.sees[b * p_.sees_batch_stride + q * p_.sees_query_stride + (j - held) * p_.sees_token_stride];
  }
  double logit(double product) const {
    const double scaled = product * p_.scaling;
    return p_.softcap == 0 ? scaled : p_.softcap * std::tanh(scaled / p_.softcap);
  }

  void attend(int64_t b, int64_t h) {
    const int64_t S = which_.held_by(h) + p_.queries, row = b * p_.heads + h;
    const int32_t n = p_.skipped_count == nullptr ? 0 : p_.skipped_count[row];
    const double size = n > 0 && p_.skipped_mean ? n : 1;
    std::vector<double> votes(size_t(S), 0.0);
    double lost = 0;
    int64_t voters = 0;
    for (int64_t q = 0; q < p_.queries; ++q) {
      const double weight = p_.query_weights == nullptr ? 1.0 : p_.query_weights[b * p_.query_weight_batch_stride + q];
      for (int64_t g = 0; g < p_.group; ++g) {
        const int64_t head = h * p_.group + g;
        std::vector<double> shares(size_t(S), 0.0);
        double sum = 0, entry = 0;
        bool sees_any = false;
        for (int64_t j = 0; j < S; ++j) {
          if (!sees(b, h, q, j)) continue;
          double product = 0;
          for (int64_t d = 0; d < p_.keys.dim; ++d) product += at(p_.query, b, head, q, d) * key(b, h, j, d);
          sum += shares[size_t(j)] = std::exp(logit(product));
          sees_any = true;
        }
        if (n > 0) {
          double product = 0;
          for (int64_t d = 0; d < p_.keys.dim; ++d) {
            product += at(p_.query, b, head, q, d) * wide_at(p_.skipped_keys, row * p_.keys.dim + d) / size;
          }
          sum += entry = size * std::exp(logit(product));
        }
        if (p_.sinks != nullptr) {
          sum += std::exp(number_at(p_.sinks_dtype, static_cast<const char*>(p_.sinks) + head * 2));
        }
        if (!sees_any) sum = kInf;
        for (int64_t j = 0; j < S; ++j) {
          shares[size_t(j)] /= sum;
          if (weight != 0) votes[size_t(j)] += weight * shares[size_t(j)];
        }
        if (weight != 0) lost += entry / sum, ++voters;
        for (int64_t d = 0; d < p_.values.dim; ++d) {
          double out = n > 0 ? entry / sum * wide_at(p_.skipped_values, row * p_.values.dim + d) / size : 0.0;
          for (int64_t j = 0; j < S; ++j) {
            if (is_there(b, h, j)) out += shares[size_t(j)] * at(p_.values, b, h, first_row(h) + j, d);
          }
          const int64_t lane = (b * p_.heads * p_.group + head) * p_.queries + q;
          expected_.output[size_t(lane * p_.values.dim + d)] = out;
        }
      }
    }
    if (p_.lost != nullptr) expected_.lost[size_t(row)] = lost / double(std::max<int64_t>(voters, 1));
    if (p_.facts == nullptr) return;
    for (int64_t j = 0; j < S; ++j) {
      double& score = expected_.scores[place(b, h, j)];
      if (std::isfinite(score)) score = (p_.carry == nullptr ? 1.0 : p_.carry[b]) * score + votes[size_t(j)];
      if (p_.redundancy && is_there(b, h, j)) raise_redundancy(b, h, j);
    }
  }

  void raise_redundancy(int64_t b, int64_t h, int64_t j) {
    const int64_t held = which_.held_by(h);
    const float* const scales = p_.facts + kKeyScalePlane * p_.fact_plane_stride;
    double& redundancy = expected_.redundancy[place(b, h, j)];
    for (int64_t i = std::max(held, j + 1); i < held + p_.queries; ++i) {
      if (!is_there(b, h, i)) continue;
      double cosine = 0;
      for (int64_t d = 0; d < p_.keys.dim; ++d) cosine += key(b, h, i, d) * key(b, h, j, d);
      redundancy = std::max(redundancy, cosine * scales[place(b, h, i)] * scales[place(b, h, j)]);
    }
  }

  const ChunkCase& which_;
  const ChunkAttentionParams& p_;
  ChunkExpected expected_;
};

}  // namespace fsdc::test
