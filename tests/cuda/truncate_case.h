// SPDX-License-Identifier: Apache-2.0
// One call of truncate, on the CPU's kernels and on the device.
#pragma once

#include "inputs.h"
#include "kernels/cpu/cpu.h"

namespace fsdc::test {

// Attention weights in place of scores.
struct WeightsCase {
  bool is_used = false;
  DType dtype = DType::kFloat32;
  int64_t group = 1, queries = 1;
  bool has_specials = false;  // infinities and NaN among them
};

struct TruncateCase {
  int64_t batch = 1, heads = 1, tokens = 1, kept = 1;
  bool has_skipped = false;
  DType dtype = DType::kFloat32;
  int64_t key_dim = 4, value_dim = 4;
  int64_t token_padding = 0;         // elements between tokens
  int64_t head_padding = 0;          // between heads
  int64_t batch_padding = 0;         // between batch rows
  bool tokens_before_heads = false;  // [B, S, H, D], seen as [B, H, S, D]
  int64_t unaligned_elements = 0;    // from the start of an allocation to the first token
  int64_t unaligned_out = 0;         // the same of what is written
  bool broadcast_tokens = false;     // every token is the same one
  int64_t score_padding = 0;         // scores between heads, and once more between batch rows
  std::vector<float> scores = {};    // [B, H, S], with the padding
  WeightsCase weights = {};
  cuda::TruncatePlan plan = {};  // on the device

  int64_t rows() const { return batch * heads; }
  int64_t entries() const { return kept + has_skipped; }
  int64_t score_head_stride() const { return tokens + score_padding; }
  int64_t score_batch_stride() const { return heads * score_head_stride() + score_padding; }
};

struct TruncateResult {
  Bytes keys, values, indices;
};

inline void require_same(DType dtype, const TruncateResult& actual, const TruncateResult& expected) {
  REQUIRE(actual.indices == expected.indices);
  REQUIRE(first_difference(dtype, actual.keys, expected.keys) == -1);
  REQUIRE(first_difference(dtype, actual.values, expected.values) == -1);
}

namespace detail {

struct Source {
  Bytes bytes;
  int64_t offset, token_stride, head_stride, batch_stride;
};

inline Source source_of(const TruncateCase& which, int64_t dim, uint32_t seed) {
  const int64_t width = dim + which.token_padding;
  int64_t token = width, head = which.tokens * width + which.head_padding;
  if (which.broadcast_tokens) {
    token = 0, head = dim;
  } else if (which.tokens_before_heads) {
    token = which.heads * width, head = width;
  }
  const int64_t batch = which.heads * (which.tokens_before_heads ? which.tokens * width : head) + which.batch_padding;
  const int64_t count = which.unaligned_elements + which.batch * batch;
  return {random_elements(which.dtype, count, seed), which.unaligned_elements * element_size(which.dtype), token, head,
          batch};
}

inline TokenRows token_rows(const TruncateCase& which, const Source& source, int64_t dim, const char* data, char* out) {
  return {.source = data + source.offset,
          .batch_stride = source.batch_stride,
          .head_stride = source.head_stride,
          .token_stride = source.token_stride,
          .head_dim = dim,
          .out = out + which.unaligned_out * element_size(which.dtype)};
}

// What nobody writes differs between CPU and device, and so is found.
constexpr char kUnwrittenOnCpu = 0x11, kUnwrittenOnDevice = 0x22;

struct Outputs {
  Bytes keys, values, indices;

  Outputs(const TruncateCase& which, char unwritten)
      : keys(rows_of(which, which.key_dim), unwritten),
        values(rows_of(which, which.value_dim), unwritten),
        indices(size_t(which.rows() * which.entries() * 8), unwritten) {}

 private:
  static size_t rows_of(const TruncateCase& which, int64_t dim) {
    return size_t((which.unaligned_out + which.rows() * which.entries() * dim) * element_size(which.dtype));
  }
};

// Without what lies before the first row.
inline TruncateResult result_of(const TruncateCase& which, Bytes keys, Bytes values, Bytes indices) {
  const int64_t before = which.unaligned_out * element_size(which.dtype);
  for (Bytes* rows : {&keys, &values}) rows->erase(rows->begin(), rows->begin() + before);
  return {keys, values, indices};
}

// The weights [B, H * G, Q, S] at `weights`, to be summed into `scores`.
inline AccumulateScoresParams weight_params(const TruncateCase& which, const char* weights, float* scores) {
  const int64_t query_tokens = which.weights.queries * which.tokens;
  return {.batch = which.batch,
          .heads = which.heads,
          .group = which.weights.group,
          .queries = which.weights.queries,
          .tokens = which.tokens,
          .overwrite = true,
          .dtype = which.weights.dtype,
          .scores = scores,
          .score_batch_stride = which.heads * which.tokens,
          .score_head_stride = which.tokens,
          .score_token_stride = 1,
          .weights = weights,
          .weight_batch_stride = which.heads * which.weights.group * query_tokens,
          .weight_head_stride = query_tokens,
          .weight_query_stride = which.tokens,
          .weight_token_stride = 1,
          .query_weights = nullptr,
          .query_weight_batch_stride = 0,
          .query_weight_query_stride = 0,
          .carry = nullptr,
          .carry_stride = 0};
}

inline Bytes weight_bytes(const TruncateCase& which) {
  const WeightsCase& weights = which.weights;
  Bytes bytes = random_elements(weights.dtype, which.rows() * weights.group * weights.queries * which.tokens, 3);
  const float specials[] = {kInf, -kInf, kNaN, -kNaN};
  const size_t size = size_t(element_size(weights.dtype));
  for (size_t i = 0; weights.has_specials && i * size < bytes.size(); i += 5) {
    store(weights.dtype, specials[i % 4], bytes.data() + i * size);
  }
  return bytes;
}

inline TruncateParams params_of(const TruncateCase& which, const void* scores, TokenRows keys, TokenRows values,
                                char* indices) {
  return {.batch = which.batch,
          .heads = which.heads,
          .tokens = which.tokens,
          .kept = which.kept,
          .has_skipped = which.has_skipped,
          .dtype = which.dtype,
          .scores = static_cast<const float*>(scores),
          .score_batch_stride = which.score_batch_stride(),
          .score_head_stride = which.score_head_stride(),
          .keys = keys,
          .values = values,
          .indices = reinterpret_cast<int64_t*>(indices)};
}

// As far as plans look at it.
inline TruncateParams shape_of(const TruncateCase& which) {
  static const float kScore = 0;
  const TokenRows keys{nullptr, 0, 0, 0, which.key_dim, nullptr}, values{nullptr, 0, 0, 0, which.value_dim, nullptr};
  return params_of(which, which.weights.is_used ? nullptr : &kScore, keys, values, nullptr);
}

}  // namespace detail

inline TruncateResult truncate_on_cpu(const TruncateCase& which) {
  using namespace detail;
  const Source keys = source_of(which, which.key_dim, 1), values = source_of(which, which.value_dim, 2);
  Outputs out(which, kUnwrittenOnCpu);
  std::vector<float> scores = which.scores;
  if (which.weights.is_used) {
    scores.resize(size_t(which.rows() * which.tokens));
    cpu::accumulate_scores(weight_params(which, weight_bytes(which).data(), scores.data()), cpu::Sequential());
  }
  cpu::truncate(
      params_of(which, scores.data(), token_rows(which, keys, which.key_dim, keys.bytes.data(), out.keys.data()),
                token_rows(which, values, which.value_dim, values.bytes.data(), out.values.data()), out.indices.data()),
      cpu::Sequential());
  return result_of(which, out.keys, out.values, out.indices);
}

inline TruncateResult truncate_on_device(const TruncateCase& which) {
  using namespace detail;
  const Source keys = source_of(which, which.key_dim, 1), values = source_of(which, which.value_dim, 2);
  const Outputs out(which, kUnwrittenOnDevice);
  const bool sums = which.weights.is_used;
  const DeviceMemory scores(sums ? weight_bytes(which) : to_bytes(which.scores));
  const DeviceMemory source_keys(keys.bytes), source_values(values.bytes);
  const DeviceMemory out_keys(out.keys), out_values(out.values), indices(out.indices);
  TruncateParams params =
      params_of(which, sums ? nullptr : scores.data(),
                token_rows(which, keys, which.key_dim, source_keys.data(), out_keys.data()),
                token_rows(which, values, which.value_dim, source_values.data(), out_values.data()), indices.data());
  if (sums) params.weights = weight_params(which, scores.data(), nullptr);
  truncate(params, which.plan);
  return result_of(which, out_keys.copy(), out_values.copy(), indices.copy());
}

inline void check_truncate(const TruncateCase& which, const TruncateResult& expected) {
  CAPTURE(which.plan.cluster, which.plan.clusters_per_row, which.plan.codes_on_chip, which.weights.is_used);
  CAPTURE(which.batch, which.heads, which.tokens, which.kept, which.has_skipped, int(which.dtype), which.key_dim,
          which.value_dim, which.token_padding, which.head_padding, which.batch_padding, which.tokens_before_heads,
          which.unaligned_elements, which.unaligned_out, which.broadcast_tokens, which.score_padding);
  require_same(which.dtype, truncate_on_device(which), expected);
}

}  // namespace fsdc::test
