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

// What the slots of a layer hold, all written in place by decode_attention_.
struct Slots {
  at::Tensor keys;       // [B, H, N + 1, D]: N slots of each KV head, and one that stays free
  at::Tensor values;     // [B, H, N + 1, Dv]
  at::Tensor facts;      // fp32 [4, B, H, N + 1]: scores, norms of values, redundancy, 1 over norms of keys
  at::Tensor positions;  // int32 [B, H, N + 1], -1 where a slot is empty; there its score is -inf
  at::Tensor seen;       // int32 [B]
  // int32 [H, 4] where heads differ: first row, N, sink tokens and recent tokens of each; the slots of all heads lie
  // in one dimension then, [B, rows, D].
  std::optional<at::Tensor> head_layout = std::nullopt;

  // The entry of the evicted tokens, all four or none: sums of keys [B, H, D] and values [B, H, Dv] in fp32 (fp64 for
  // fp64), their int32 count [B, H], and fp32 [B, H], the share of a step's attention that the entry received.
  std::optional<at::Tensor> skipped_keys = std::nullopt, skipped_values = std::nullopt, skipped_count = std::nullopt;
  std::optional<at::Tensor> lost = std::nullopt;
  bool skipped_mean = true;  // false: the entry's key and value are the sums themselves
};

// Which token goes, see docs/eviction.md.
struct EvictionRule {
  double decay = 1, prior = 0.02, redundancy = 0.95;
  bool value_weight = true;
  int64_t sink_tokens = 0, recent_tokens = 0;
};

// What a model makes of q . k, and what is known of the new tokens.
struct DecodeOptions {
  double scaling = 1;
  std::optional<double> softcap = std::nullopt;
  std::optional<at::Tensor> sinks = std::nullopt;         // attention sinks [Hq]
  std::optional<at::Tensor> valid = std::nullopt;         // bool [B], false for padding
  std::optional<at::Tensor> is_protected = std::nullopt;  // bool [B], true for tokens that never go
};

// Attends to the slots and to one new token of each row, adds the attention to the scores, and puts the new token in the
// place of the one that goes.
//   query [B, Hq, 1, D], new_keys [B, H, 1, D], new_values [B, H, 1, Dv]; length: tokens seen before, padding included
// Returns the attention's output [B, Hq, 1, Dv].
inline at::Tensor decode_attention_(const at::Tensor& query, const at::Tensor& new_keys, const at::Tensor& new_values,
                                    Slots& slots, int64_t length, const EvictionRule& rule,
                                    const DecodeOptions& options) {
  using Optional = const std::optional<at::Tensor>&;
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&,
                               at::Tensor&, at::Tensor&, at::Tensor&, c10::SymInt, double, double, double, double, bool,
                               c10::SymInt, c10::SymInt, std::optional<double>, Optional, Optional, Optional, Optional,
                               Optional, Optional, Optional, Optional, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fsdc::decode_attention_", "").typed<Signature>();
  return op.call(query, new_keys, new_values, slots.keys, slots.values, slots.facts, slots.positions, slots.seen,
                 length, options.scaling, rule.decay, rule.prior, rule.redundancy, rule.value_weight, rule.sink_tokens,
                 rule.recent_tokens, options.softcap, options.sinks, options.valid, options.is_protected,
                 slots.head_layout, slots.skipped_keys, slots.skipped_values, slots.skipped_count, slots.lost,
                 slots.skipped_mean);
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
