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

// What chunk_attention_ takes beside query, keys and values; the schema's names and defaults (csrc/ops.cpp).
struct ChunkAttentionOptions {
  std::optional<at::Tensor> facts =
      std::nullopt;  // [4, B, H, S] fp32: scores, norms of values, redundancy, 1 over norms of keys
  std::optional<at::Tensor> positions = std::nullopt;
  std::optional<at::Tensor> query_weights = std::nullopt;
  std::optional<at::Tensor> carry = std::nullopt;
  bool redundancy = false;
  std::optional<at::Tensor> sees = std::nullopt;
  std::optional<double> softcap = std::nullopt;
  std::optional<at::Tensor> sinks = std::nullopt;
  std::optional<at::Tensor> head_layout = std::nullopt;
  std::optional<at::Tensor> skipped_keys = std::nullopt;
  std::optional<at::Tensor> skipped_values = std::nullopt;
  std::optional<at::Tensor> skipped_count = std::nullopt;
  std::optional<at::Tensor> lost = std::nullopt;
  bool skipped_mean = true;
};

// Attention [B, Hq, Q, Dv] of Q new tokens to the tokens held, which come first, and to each other; it is added to the
// scores in `facts`, in place. On the CPU.
//   query [B, Hq, Q, D]; keys, values [B, H, S, D], D may differ
inline at::Tensor chunk_attention_(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                                   double scaling, const ChunkAttentionOptions& options = {}) {
  using Optional = const std::optional<at::Tensor>&;
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, Optional, Optional,
                               Optional, Optional, bool, Optional, std::optional<double>, Optional, Optional, Optional,
                               Optional, Optional, Optional, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fsdc::chunk_attention_", "").typed<Signature>();
  return op.call(query, keys, values, scaling, options.facts, options.positions, options.query_weights, options.carry,
                 options.redundancy, options.sees, options.softcap, options.sinks, options.head_layout,
                 options.skipped_keys, options.skipped_values, options.skipped_count, options.lost,
                 options.skipped_mean);
}

}  // namespace fsdc
