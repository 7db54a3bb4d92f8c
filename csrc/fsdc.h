// SPDX-License-Identifier: Apache-2.0
// The operators for C++ users: inline calls through the dispatcher, compiled with your own LibTorch. Link libfsdc (see
// CMakeLists.txt) or load the Python package's library first. Bad arguments throw; no gradient is recorded, so call
// them under at::NoGradGuard or torch::InferenceMode.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace fsdc {

// The min(S, cache_size) best-scored tokens of each (batch, KV head) in ascending token order, ties to the newer.
//   keys, values  [B, H, S, D]; D may differ. fp32, fp16, bf16 or fp64, contiguous last dimension
//   scores        [B, H, S], or attention weights [B, Hq, Q, S], which are summed per group and over the queries
// Returns keys, values [B, H, K, D] and indices int64 [B, H, K]. With include_skipped and S > cache_size the last
// entry is the sum of all skipped tokens, with index -1.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> truncate(const at::Tensor& keys, const at::Tensor& values,
                                                               const at::Tensor& scores, int64_t cache_size,
                                                               bool include_skipped = false) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                   const at::Tensor&, c10::SymInt, bool);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fsdc::truncate", "").typed<Signature>();
  return op.call(keys, values, scores, cache_size, include_skipped);
}

// scores = carry * scores + sum over q and g of query_weights * weights, in place; scores not finite are left alone.
//   scores [B, H, S] fp32; weights [B, Hq, Q, S]; query_weights [B, Q] fp32; carry [B] fp32
inline void accumulate_scores_(at::Tensor& scores, const at::Tensor& weights,
                               const std::optional<at::Tensor>& query_weights = std::nullopt,
                               const std::optional<at::Tensor>& carry = std::nullopt) {
  using Signature =
      void(at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fsdc::accumulate_scores_", "").typed<Signature>();
  op.call(scores, weights, query_weights, carry);
}

}  // namespace fsdc
