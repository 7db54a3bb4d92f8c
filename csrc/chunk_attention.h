// SPDX-License-Identifier: Apache-2.0
// chunk_attention_ for every device: argument rules, the output, then the parameters of the kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "csrc/checks.h"
#include "csrc/overlap.h"
#include "kernels/chunk_attention.h"

namespace fsdc {

struct ChunkArguments {
  const Tensor& query;
  const Tensor& keys;
  const Tensor& values;
  const std::optional<Tensor>& facts;
  const std::optional<Tensor>& positions;
  const std::optional<Tensor>& query_weights;
  const std::optional<Tensor>& carry;
  bool redundancy;
  const std::optional<Tensor>& sees;
  std::optional<double> softcap;
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& head_layout;
  const std::optional<Tensor>& skipped_keys;
  const std::optional<Tensor>& skipped_values;
  const std::optional<Tensor>& skipped_count;
  const std::optional<Tensor>& lost;

  int64_t batch() const { return query.size(0); }
  int64_t queries() const { return query.size(2); }
  int64_t heads() const { return head_layout.has_value() ? head_layout->size(0) : keys.size(1); }
};

// Keys, values, facts and positions: [B, H, S, ...], or with a head_layout [B, rows, ...].
inline void check_tokens_of_heads(const char* op, const ChunkArguments& a) {
  const bool flat = a.head_layout.has_value();
  check_rank(op, "keys", a.keys, flat ? 3 : 4, flat ? "[B, rows, D] with a head_layout" : "[B, H, S, D]");
  check_rank(op, "values", a.values, flat ? 3 : 4, flat ? "[B, rows, Dv] with a head_layout" : "[B, H, S, Dv]");
  if (flat) {
    check_rank(op, "head_layout", *a.head_layout, 2, "[H, 2]");
    check_sizes(op, "head_layout", *a.head_layout, {a.heads(), 2}, "[H, 2]");
    check_type(op, "head_layout", *a.head_layout, ScalarType::Int);
    FSDC_CHECK(a.head_layout->is_contiguous(), op, ": head_layout must be contiguous; got strides ",
               to_text(a.head_layout->strides()));
    FSDC_CHECK(a.head_layout->is_cpu(), op, ": head_layout must be on the CPU, where it is read; got ",
               device_text(*a.head_layout));
  }
  const int64_t batch = a.batch(), heads = a.heads(), tokens = a.keys.size(flat ? 1 : 2), dim = a.query.size(3);
  const int64_t value_dim = a.values.size(flat ? 2 : 3);
  if (flat) {
    check_sizes(op, "keys", a.keys, {batch, tokens, dim}, "[B, rows, D]");
    check_sizes(op, "values", a.values, {batch, tokens, value_dim}, "[B, rows, Dv]");
    if (a.facts.has_value()) check_sizes(op, "facts", *a.facts, {4, batch, tokens}, "[4, B, rows]");
    if (a.positions.has_value()) check_sizes(op, "positions", *a.positions, {batch, tokens}, "[B, rows]");
  } else {
    check_sizes(op, "keys", a.keys, {batch, heads, tokens, dim}, "[B, H, S, D]");
    check_sizes(op, "values", a.values, {batch, heads, tokens, value_dim}, "[B, H, S, Dv]");
    if (a.facts.has_value()) check_sizes(op, "facts", *a.facts, {4, batch, heads, tokens}, "[4, B, H, S]");
    if (a.positions.has_value()) check_sizes(op, "positions", *a.positions, {batch, heads, tokens}, "[B, H, S]");
  }
  check_like_query(op, "keys", a.keys, a.query);
  check_like_query(op, "values", a.values, a.query);
  check_tokens(op, "keys", tokens);
  FSDC_CHECK(flat || tokens >= a.queries(), op, ": keys must have at least the ", a.queries(), " new tokens; got ",
             tokens);
  const int64_t query_heads = a.query.size(1);
  FSDC_CHECK(heads == 0 ? query_heads == 0 : query_heads > 0 && query_heads % heads == 0, op,
             ": query must have a multiple of the ", heads, " KV heads; got ", query_heads, " heads");
}

// The entry of the evicted tokens: its three tensors or none, and `lost` only with them.
inline void check_entry(const char* op, const ChunkArguments& a) {
  const bool given = a.skipped_keys.has_value();
  FSDC_CHECK(given == a.skipped_values.has_value() && given == a.skipped_count.has_value(), op,
             ": skipped_keys, skipped_values and skipped_count must be given together; got some of them");
  FSDC_CHECK(given || !a.lost.has_value(), op, ": lost must be given with skipped_keys only; got it alone");
  if (!given) return;
  const ScalarType wide = a.query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t batch = a.batch(), heads = a.heads();
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType type) {
    check_type(op, name, tensor, type);
    FSDC_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous; got strides ", to_text(tensor.strides()));
  };
  check_sizes(op, "skipped_keys", *a.skipped_keys, {batch, heads, a.query.size(3)}, "[B, H, D]");
  check("skipped_keys", *a.skipped_keys, wide);
  check_sizes(op, "skipped_values", *a.skipped_values, {batch, heads, a.values.size(a.values.dim() - 1)}, "[B, H, Dv]");
  check("skipped_values", *a.skipped_values, wide);
  check_sizes(op, "skipped_count", *a.skipped_count, {batch, heads}, "[B, H]");
  check("skipped_count", *a.skipped_count, ScalarType::Int);
  if (!a.lost.has_value()) return;
  check_sizes(op, "lost", *a.lost, {batch, heads}, "[B, H]");
  check("lost", *a.lost, ScalarType::Float);
}

inline void check_chunk_attention(const ChunkArguments& a) {
  const char* op = "chunk_attention_";
  check_rank(op, "query", a.query, 4, "[B, Hq, Q, D]");
  check_floating(op, "query", a.query);
  check_contiguous_rows(op, "query", a.query);
  check_tokens_of_heads(op, a);
  if (a.facts.has_value()) {
    check_float32(op, "facts", *a.facts);
    check_contiguous_rows(op, "facts", *a.facts);
  }
  FSDC_CHECK(a.facts.has_value() || !a.redundancy, op, ": redundancy must be False without facts; got True");
  if (a.positions.has_value()) {
    check_type(op, "positions", *a.positions, ScalarType::Int);
    check_contiguous_rows(op, "positions", *a.positions);
  }
  if (a.query_weights.has_value()) {
    check_sizes(op, "query_weights", *a.query_weights, {a.batch(), a.queries()}, "[B, Q]");
    check_float32(op, "query_weights", *a.query_weights);
  }
  if (a.carry.has_value()) {
    check_sizes(op, "carry", *a.carry, {a.batch()}, "[B]");
    check_float32(op, "carry", *a.carry);
  }
  if (a.sees.has_value()) {
    check_sizes(op, "sees", *a.sees, {a.batch(), a.queries(), a.queries()}, "[B, Q, Q]");
    check_type(op, "sees", *a.sees, ScalarType::Bool);
  }
  if (a.sinks.has_value()) {
    check_sizes(op, "sinks", *a.sinks, {a.query.size(1)}, "[Hq]");
    check_floating(op, "sinks", *a.sinks);
    check_contiguous_rows(op, "sinks", *a.sinks);
  }
  FSDC_CHECK(!a.softcap.has_value() || *a.softcap > 0, op, ": softcap must be above 0; got ", *a.softcap);
  check_entry(op, a);

  const std::initializer_list<Argument> written = {{"facts", pointer(a.facts)}, {"lost", pointer(a.lost)}};
  const std::initializer_list<Argument> read = {{"query", &a.query},
                                                {"keys", &a.keys},
                                                {"values", &a.values},
                                                {"positions", pointer(a.positions)},
                                                {"query_weights", pointer(a.query_weights)},
                                                {"carry", pointer(a.carry)},
                                                {"sees", pointer(a.sees)},
                                                {"sinks", pointer(a.sinks)},
                                                {"head_layout", pointer(a.head_layout)},
                                                {"skipped_keys", pointer(a.skipped_keys)},
                                                {"skipped_values", pointer(a.skipped_values)},
                                                {"skipped_count", pointer(a.skipped_count)}};
  for (const auto& arguments : {written, read}) {
    for (const Argument& argument : arguments) {
      if (argument.tensor == nullptr || argument.tensor == pointer(a.head_layout)) continue;
      check_same_device(op, argument.name, *argument.tensor, "query", a.query);
    }
  }
  check_no_overlap(op, written, read);
}

// The most tokens that a head holds; the layout is checked on the way.
inline int64_t most_held(const ChunkArguments& a) {
  if (!a.head_layout.has_value()) return a.keys.size(2) - a.queries();
  const int32_t* layout = a.head_layout->const_data_ptr<int32_t>();
  int64_t most = 0;
  for (int64_t head = 0; head < a.heads(); ++head, layout += 2) {
    const bool fits = layout[0] >= 0 && layout[1] >= 0 && layout[0] + layout[1] + a.queries() <= a.keys.size(1);
    FSDC_CHECK(fits, "chunk_attention_: head_layout must hold (first row, tokens held) within the ", a.keys.size(1),
               " rows of keys; got ", to_text(std::vector<int64_t>(layout, layout + 2)), " for head ", head);
    most = std::max<int64_t>(most, layout[1]);
  }
  return most;
}

// [B, heads, tokens, D], or [B, rows, D] of heads that lie flat.
inline TokenVectors token_vectors(const Tensor& tensor) {
  const auto strides = tensor.strides();
  const bool flat = strides.size() == 3;
  return {.data = tensor.const_data_ptr(),
          .batch_stride = strides[0],
          .head_stride = flat ? 0 : strides[1],
          .token_stride = strides[flat ? 1 : 2],
          .dim = tensor.size(flat ? 2 : 3)};
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

inline int64_t stride_or_zero(const std::optional<Tensor>& tensor, int64_t dim) {
  return tensor.has_value() ? tensor->stride(dim) : 0;
}

template <class Backend>
Tensor chunk_attention(Tensor query, Tensor keys, Tensor values, double scaling, std::optional<Tensor> facts,
                       std::optional<Tensor> positions, std::optional<Tensor> query_weights,
                       std::optional<Tensor> carry, bool redundancy, std::optional<Tensor> sees,
                       std::optional<double> softcap, std::optional<Tensor> sinks, std::optional<Tensor> head_layout,
                       std::optional<Tensor> skipped_keys, std::optional<Tensor> skipped_values,
                       std::optional<Tensor> skipped_count, std::optional<Tensor> lost, bool skipped_mean) {
  const ChunkArguments arguments{query,        keys,           values,        facts,   positions, query_weights,
                                 carry,        redundancy,     sees,          softcap, sinks,     head_layout,
                                 skipped_keys, skipped_values, skipped_count, lost};
  check_chunk_attention(arguments);
  const int64_t held = most_held(arguments);
  const Backend backend(query);
  const int64_t batch = arguments.batch(), heads = arguments.heads();
  const bool flat = head_layout.has_value();
  const Tensor output =
      torch::stable::new_empty(query, std::vector{batch, query.size(1), query.size(2), values.size(values.dim() - 1)});
  const ChunkAttentionParams params{
      .batch = batch,
      .heads = heads,
      .group = heads == 0 ? 0 : query.size(1) / heads,
      .queries = query.size(2),
      .held = held,
      .dtype = to_dtype(query.scalar_type()),
      .head_layout = data_or_null<int32_t>(head_layout),
      .query = token_vectors(query),
      .keys = token_vectors(keys),
      .values = token_vectors(values),
      .facts = facts.has_value() ? facts->mutable_data_ptr<float>() : nullptr,
      .fact_plane_stride = stride_or_zero(facts, 0),
      .fact_batch_stride = stride_or_zero(facts, 1),
      .fact_head_stride = flat ? 0 : stride_or_zero(facts, 2),
      .positions = data_or_null<int32_t>(positions),
      .position_batch_stride = stride_or_zero(positions, 0),
      .position_head_stride = flat ? 0 : stride_or_zero(positions, 1),
      .query_weights = data_or_null<float>(query_weights),
      .query_weight_batch_stride = stride_or_zero(query_weights, 0),
      .query_weight_query_stride = stride_or_zero(query_weights, 1),
      .carry = data_or_null<float>(carry),
      .carry_stride = stride_or_zero(carry, 0),
      .redundancy = redundancy,
      .sees = data_or_null<bool>(sees),
      .sees_batch_stride = stride_or_zero(sees, 0),
      .sees_query_stride = stride_or_zero(sees, 1),
      .sees_token_stride = stride_or_zero(sees, 2),
      .scaling = scaling,
      .softcap = softcap.value_or(0),
      .sinks = sinks.has_value() ? sinks->const_data_ptr() : nullptr,
      .sinks_dtype = sinks.has_value() ? to_dtype(sinks->scalar_type()) : DType::kFloat32,
      .skipped_keys = skipped_keys.has_value() ? skipped_keys->const_data_ptr() : nullptr,
      .skipped_values = skipped_values.has_value() ? skipped_values->const_data_ptr() : nullptr,
      .skipped_count = data_or_null<int32_t>(skipped_count),
      .lost = lost.has_value() ? lost->mutable_data_ptr<float>() : nullptr,
      .skipped_mean = skipped_mean,
      .output = output.mutable_data_ptr()};
  backend.chunk_attention(params);
  return output;
}

}  // namespace fsdc
