// SPDX-License-Identifier: Apache-2.0
// truncate for every device: argument rules, outputs, then the parameters of the kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "csrc/accumulate_scores.h"
#include "csrc/checks.h"
#include "kernels/truncate.h"

namespace fsdc {

inline void check_truncate(const Tensor& keys, const Tensor& values, const Tensor& scores, int64_t cache_size,
                           bool include_skipped) {
  const char* op = "truncate";
  check_rank(op, "keys", keys, 4, "[B, H, S, D]");
  check_floating(op, "keys", keys);
  check_rank(op, "values", values, 4, "[B, H, S, D]");
  FSDC_CHECK(values.scalar_type() == keys.scalar_type(), op, ": values must have the type of keys, ",
             to_text(keys.scalar_type()), "; got ", to_text(values.scalar_type()));
  check_same_device(op, "values", values, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  FSDC_CHECK(values.size(0) == batch && values.size(1) == heads && values.size(2) == tokens, op,
             ": values must have the batch, heads and tokens of keys, ", to_text(keys.sizes().slice(0, 3)),
             "; got sizes ", to_text(values.sizes()));
  check_contiguous_rows(op, "keys", keys);
  check_contiguous_rows(op, "values", values);
  check_tokens(op, "keys", tokens);

  check_given(op, "scores", scores);
  FSDC_CHECK(scores.dim() == 3 || scores.dim() == 4, op,
             ": scores must be [B, H, S], or attention weights [B, Hq, Q, S]; got sizes ", to_text(scores.sizes()));
  check_floating(op, "scores", scores);
  check_same_device(op, "scores", scores, "keys", keys);
  if (scores.dim() == 4) {
    check_weights(op, "scores", scores, batch, heads, tokens);
  } else {
    FSDC_CHECK(scores.size(0) == batch && scores.size(1) == heads && scores.size(2) == tokens, op,
               ": scores must be [B, H, S] = ", to_text(keys.sizes().slice(0, 3)), "; got sizes ",
               to_text(scores.sizes()));
  }

  check_aligned(op, "keys", keys);
  check_aligned(op, "values", values);
  check_aligned(op, "scores", scores);

  FSDC_CHECK(cache_size >= 1, op, ": cache_size must be at least 1; got ", cache_size);
  FSDC_CHECK(cache_size >= 2 || !include_skipped, op, ": cache_size must be at least 2 with include_skipped; got ",
             cache_size);
}

// Scores of another type or layout than the kernel's are weights of one query, [B, H, 1, S]: their sums are a copy.
inline Tensor as_weights(const Tensor& scores) {
  return scores.dim() == 4 ? scores : torch::stable::unsqueeze(scores, 2);
}

// Scores as the kernel wants them: [B, H, S] fp32 with a contiguous last dimension.
inline bool are_row_scores(const Tensor& scores) {
  return scores.dim() == 3 && scores.scalar_type() == ScalarType::Float &&
         (scores.size(2) <= 1 || scores.stride(2) == 1);
}

// The weights' sums, as row scores.
template <class Backend>
Tensor sum_weights(const Tensor& keys, const Tensor& weights, const Backend& backend) {
  const std::vector<int64_t> sizes{keys.size(0), keys.size(1), keys.size(2)};
  const Tensor sums = torch::stable::new_empty(weights, sizes, ScalarType::Float);
  AccumulateScoresParams params = accumulate_scores_params(sums, weights);
  params.overwrite = true;
  backend.accumulate_scores(params);
  return sums;
}

inline TokenRows token_rows(const Tensor& source, const Tensor& out) {
  return {.source = source.const_data_ptr(),
          .batch_stride = source.stride(0),
          .head_stride = source.stride(1),
          .token_stride = source.stride(2),
          .head_dim = source.size(3),
          .out = out.mutable_data_ptr()};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> truncate(Tensor keys, Tensor values, Tensor scores, int64_t cache_size,
                                            bool include_skipped) {
  check_truncate(keys, values, scores, cache_size, include_skipped);
  const Backend backend(keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  const int64_t entries = std::min(tokens, cache_size);
  const bool has_skipped = include_skipped && tokens > cache_size;

  const Tensor out_keys = torch::stable::new_empty(keys, std::vector{batch, heads, entries, keys.size(3)});
  const Tensor out_values = torch::stable::new_empty(values, std::vector{batch, heads, entries, values.size(3)});
  const Tensor indices = torch::stable::new_empty(keys, std::vector{batch, heads, entries}, ScalarType::Long);
  TruncateParams params{.batch = batch,
                        .heads = heads,
                        .tokens = tokens,
                        .kept = entries - (has_skipped ? 1 : 0),
                        .has_skipped = has_skipped,
                        .dtype = to_dtype(keys.scalar_type()),
                        .scores = nullptr,
                        .score_batch_stride = 0,
                        .score_head_stride = 0,
                        .keys = token_rows(keys, out_keys),
                        .values = token_rows(values, out_values),
                        .indices = indices.mutable_data_ptr<int64_t>()};
  Tensor row_scores = scores;  // alive until the kernel has been launched
  const bool has_weights = !are_row_scores(scores);
  if (has_weights) params.weights = weight_params(as_weights(scores), heads);
  if (!has_weights || !backend.truncate_sums_weights(params)) {
    if (has_weights) row_scores = sum_weights(keys, as_weights(scores), backend);
    params.scores = row_scores.const_data_ptr<float>();
    params.score_batch_stride = row_scores.stride(0);
    params.score_head_stride = row_scores.stride(1);
  }
  backend.truncate(params);
  return {out_keys, out_values, indices};
}

}  // namespace fsdc
