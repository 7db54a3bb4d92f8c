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
  int64_t token_padding = 0;       // elements between tokens
  int64_t unaligned_elements = 0;  // from the start of an allocation to the first token
  bool broadcast_tokens = false;   // every token is the same one
  std::vector<float> scores = {};  // [B, H, S]
  WeightsCase weights = {};
  cuda::TruncatePlan plan = {};  // on the device

  int64_t rows() const { return batch * heads; }
  int64_t entries() const { return kept + has_skipped; }
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
  int64_t offset, token_stride, head_stride;
};

inline Source source_of(const TruncateCase& which, int64_t dim, uint32_t seed) {
  const int64_t stride = which.broadcast_tokens ? 0 : dim + which.token_padding;
  const int64_t head_stride = which.broadcast_tokens ? dim : which.tokens * stride;
  const int64_t count = which.unaligned_elements + which.rows() * head_stride;
  return {random_elements(which.dtype, count, seed), which.unaligned_elements * element_size(which.dtype), stride,
          head_stride};
}

inline TokenRows token_rows(const TruncateCase& which, const Source& source, int64_t dim, const char* data, char* out) {
  return {data + source.offset, which.heads * source.head_stride, source.head_stride, source.token_stride, dim, out};
}

// What nobody writes differs between CPU and device, and so is found.
constexpr char kUnwrittenOnCpu = 0x11, kUnwrittenOnDevice = 0x22;

struct Outputs {
  Bytes keys, values, indices;

  Outputs(const TruncateCase& which, char unwritten)
      : keys(size_t(which.rows() * which.entries() * which.key_dim * element_size(which.dtype)), unwritten),
        values(size_t(which.rows() * which.entries() * which.value_dim * element_size(which.dtype)), unwritten),
        indices(size_t(which.rows() * which.entries() * 8), unwritten) {}
};

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
          .score_batch_stride = which.heads * which.tokens,
          .score_head_stride = which.tokens,
          .keys = keys,
          .values = values,
          .indices = reinterpret_cast<int64_t*>(indices)};
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
  return {out.keys, out.values, out.indices};
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
  return {out_keys.copy(), out_values.copy(), indices.copy()};
}

inline void check_truncate(const TruncateCase& which, const TruncateResult& expected) {
  CAPTURE(which.plan.cluster, which.plan.clusters_per_row, which.plan.codes_on_chip, which.weights.is_used);
  CAPTURE(which.batch, which.heads, which.tokens, which.kept, which.has_skipped, int(which.dtype), which.key_dim,
          which.value_dim, which.token_padding, which.unaligned_elements, which.broadcast_tokens);
  require_same(which.dtype, truncate_on_device(which), expected);
}

}  // namespace fsdc::test
