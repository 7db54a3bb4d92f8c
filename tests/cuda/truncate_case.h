// SPDX-License-Identifier: Apache-2.0
// One call of truncate, on the CPU's kernels and on the device.
#pragma once

#include "inputs.h"
#include "kernels/cpu/cpu.h"

namespace fsdc::test {

struct TruncateCase {
  int64_t batch = 1, heads = 1, tokens = 1, kept = 1;
  bool has_skipped = false;
  DType dtype = DType::kFloat32;
  int64_t key_dim = 4, value_dim = 4;
  int64_t token_padding = 0;       // elements between tokens
  int64_t unaligned_elements = 0;  // from the start of an allocation to the first token
  bool broadcast_tokens = false;   // every token is the same one
  std::vector<float> scores = {};  // [B, H, S]

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

inline TruncateParams params_of(const TruncateCase& which, const char* scores, TokenRows keys, TokenRows values,
                                char* indices) {
  return {.batch = which.batch,
          .heads = which.heads,
          .tokens = which.tokens,
          .kept = which.kept,
          .has_skipped = which.has_skipped,
          .dtype = which.dtype,
          .scores = reinterpret_cast<const float*>(scores),
          .score_batch_stride = which.heads * which.tokens,
          .score_head_stride = which.tokens,
          .keys = keys,
          .values = values,
          .indices = reinterpret_cast<int64_t*>(indices)};
}

}  // namespace detail

inline TruncateResult truncate_on_cpu(const TruncateCase& which) {
  const detail::Source keys = detail::source_of(which, which.key_dim, 1);
  const detail::Source values = detail::source_of(which, which.value_dim, 2);
  detail::Outputs out(which, detail::kUnwrittenOnCpu);
  const Bytes scores = to_bytes(which.scores);
  cpu::truncate(
      detail::params_of(which, scores.data(),
                        detail::token_rows(which, keys, which.key_dim, keys.bytes.data(), out.keys.data()),
                        detail::token_rows(which, values, which.value_dim, values.bytes.data(), out.values.data()),
                        out.indices.data()),
      cpu::Sequential());
  return {out.keys, out.values, out.indices};
}

inline TruncateResult truncate_on_device(const TruncateCase& which) {
  const detail::Source keys = detail::source_of(which, which.key_dim, 1);
  const detail::Source values = detail::source_of(which, which.value_dim, 2);
  const detail::Outputs out(which, detail::kUnwrittenOnDevice);
  const DeviceMemory scores(to_bytes(which.scores)), source_keys(keys.bytes), source_values(values.bytes);
  const DeviceMemory out_keys(out.keys), out_values(out.values), indices(out.indices);
  truncate(detail::params_of(
      which, scores.data(), detail::token_rows(which, keys, which.key_dim, source_keys.data(), out_keys.data()),
      detail::token_rows(which, values, which.value_dim, source_values.data(), out_values.data()), indices.data()));
  return {out_keys.copy(), out_values.copy(), indices.copy()};
}

inline void check_truncate(const TruncateCase& which) {
  CAPTURE(which.batch, which.heads, which.tokens, which.kept, which.has_skipped, int(which.dtype), which.key_dim,
          which.value_dim, which.token_padding, which.unaligned_elements, which.broadcast_tokens);
  require_same(which.dtype, truncate_on_device(which), truncate_on_cpu(which));
}

}  // namespace fsdc::test
