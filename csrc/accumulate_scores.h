// SPDX-License-Identifier: Apache-2.0
// accumulate_scores_ for every device: argument rules, then the parameters of the kernel.
#pragma once

#include <optional>

#include "csrc/checks.h"
#include "csrc/overlap.h"
#include "kernels/accumulate_scores.h"

namespace fsdc {

inline void check_accumulate_scores(const Tensor& scores, const Tensor& weights,
                                    const std::optional<Tensor>& query_weights, const std::optional<Tensor>& carry) {
  const char* op = "accumulate_scores_";
  check_rank(op, "scores", scores, 3, "[B, H, S]");
  check_float32(op, "scores", scores);
  check_rank(op, "weights", weights, 4, "[B, Hq, Q, S]");
  check_floating(op, "weights", weights);
  check_same_device(op, "weights", weights, "scores", scores);
  const int64_t batch = scores.size(0), queries = weights.size(2);
  check_weights(op, "weights", weights, batch, scores.size(1), scores.size(2));
  if (query_weights.has_value()) {
    check_float32(op, "query_weights", *query_weights);
    check_same_device(op, "query_weights", *query_weights, "scores", scores);
    FSDC_CHECK(query_weights->dim() == 2 && query_weights->size(0) == batch && query_weights->size(1) == queries, op,
               ": query_weights must be [B, Q] = [", batch, ", ", queries, "]; got sizes ",
               to_text(query_weights->sizes()));
  }
  if (carry.has_value()) {
    check_float32(op, "carry", *carry);
    check_same_device(op, "carry", *carry, "scores", scores);
    FSDC_CHECK(carry->dim() == 1 && carry->size(0) == batch, op, ": carry must be [B] = [", batch, "]; got sizes ",
               to_text(carry->sizes()));
  }
  check_no_overlap(op, {{"scores", &scores}},
                   {{"weights", &weights}, {"query_weights", pointer(query_weights)}, {"carry", pointer(carry)}});
}

// The weights' side alone, [B, Hq, Q, S] of `heads` KV heads; every query counts once and old scores in full until told
// otherwise.
inline AccumulateScoresParams weight_params(const Tensor& weights, int64_t heads) {
  return {.batch = weights.size(0),
          .heads = heads,
          .group = heads == 0 ? 0 : weights.size(1) / heads,
          .queries = weights.size(2),
          .tokens = weights.size(3),
          .overwrite = false,
          .dtype = to_dtype(weights.scalar_type()),
          .scores = nullptr,
          .score_batch_stride = 0,
          .score_head_stride = 0,
          .score_token_stride = 0,
          .weights = weights.const_data_ptr(),
          .weight_batch_stride = weights.stride(0),
          .weight_head_stride = weights.stride(1),
          .weight_query_stride = weights.stride(2),
          .weight_token_stride = weights.stride(3),
          .query_weights = nullptr,
          .query_weight_batch_stride = 0,
          .query_weight_query_stride = 0,
          .carry = nullptr,
          .carry_stride = 0};
}

// Weights into scores [B, H, S] fp32.
inline AccumulateScoresParams accumulate_scores_params(const Tensor& scores, const Tensor& weights) {
  AccumulateScoresParams params = weight_params(weights, scores.size(1));
  params.scores = scores.mutable_data_ptr<float>();
  params.score_batch_stride = scores.stride(0);
  params.score_head_stride = scores.stride(1);
  params.score_token_stride = scores.stride(2);
  return params;
}

template <class Backend>
void accumulate_scores(Tensor scores, Tensor weights, std::optional<Tensor> query_weights,
                       std::optional<Tensor> carry) {
  check_accumulate_scores(scores, weights, query_weights, carry);
  AccumulateScoresParams params = accumulate_scores_params(scores, weights);
  if (query_weights.has_value()) {
    params.query_weights = query_weights->const_data_ptr<float>();
    params.query_weight_batch_stride = query_weights->stride(0);
    params.query_weight_query_stride = query_weights->stride(1);
  }
  if (carry.has_value()) {
    params.carry = carry->const_data_ptr<float>();
    params.carry_stride = carry->stride(0);
  }
  Backend(scores).accumulate_scores(params);
}

}  // namespace fsdc
