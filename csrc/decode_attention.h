// SPDX-License-Identifier: Apache-2.0
// decode_attention_ for every device: argument rules, the output, then the parameters of the kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "csrc/checks.h"
#include "csrc/overlap.h"
#include "kernels/decode_attention.h"

namespace fsdc {

// All that a layer holds, and what one new token brings. [B, H, N + 1, D], or [B, rows, D] with a head_layout.
struct DecodeArguments {
  const Tensor& query;
  const Tensor& new_keys;
  const Tensor& new_values;
  const Tensor& keys;
  const Tensor& values;
  const Tensor& facts;
  const Tensor& positions;
  const Tensor& seen;
  int64_t length;
  double scaling;
  double decay;
  double prior;
  double redundancy;
  int64_t sink_tokens;
  int64_t recent_tokens;
  std::optional<double> softcap;
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& valid;
  const std::optional<Tensor>& is_protected;
  const std::optional<Tensor>& head_layout;
  const std::optional<Tensor>& skipped_keys;
  const std::optional<Tensor>& skipped_values;
  const std::optional<Tensor>& skipped_count;
  const std::optional<Tensor>& lost;
};

// The entry of the evicted tokens: all four tensors or none.
inline void check_entry(const char* op, const DecodeArguments& a, int64_t batch, int64_t heads) {
  const bool given = a.skipped_keys.has_value();
  FSDC_CHECK(
      given == a.skipped_values.has_value() && given == a.skipped_count.has_value() && given == a.lost.has_value(), op,
      ": skipped_keys, skipped_values, skipped_count and lost must be given together; got some of them");
  if (!given) return;
  const ScalarType wide = a.query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_sizes(op, "skipped_keys", *a.skipped_keys, {batch, heads, a.query.size(3)}, "[B, H, D]");
  check_sizes(op, "skipped_values", *a.skipped_values, {batch, heads, a.new_values.size(3)}, "[B, H, Dv]");
  check_sizes(op, "skipped_count", *a.skipped_count, {batch, heads}, "[B, H]");
  check_sizes(op, "lost", *a.lost, {batch, heads}, "[B, H]");
  check_type(op, "skipped_keys", *a.skipped_keys, wide);
  check_type(op, "skipped_values", *a.skipped_values, wide);
  check_type(op, "skipped_count", *a.skipped_count, ScalarType::Int);
  check_type(op, "lost", *a.lost, ScalarType::Float);
  for (const auto& [name, tensor] : {Argument{"skipped_keys", &*a.skipped_keys},
                                     {"skipped_values", &*a.skipped_values},
                                     {"skipped_count", &*a.skipped_count},
                                     {"lost", &*a.lost}}) {
    FSDC_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous; got strides ",
               to_text(tensor->strides()));
  }
}

// Sizes of the slots: [B, H, N + 1], or with a head_layout [B, rows].
inline void check_slots(const char* op, const DecodeArguments& a, int64_t batch, int64_t heads) {
  const int64_t rank = a.head_layout.has_value() ? 3 : 4;
  check_rank(op, "keys", a.keys, rank, rank == 4 ? "[B, H, N + 1, D]" : "[B, rows, D] with a head_layout");
  const int64_t dim = a.query.size(3), value_dim = a.new_values.size(3);
  const int64_t rows = a.keys.size(rank - 2);
  FSDC_CHECK(rows >= 2, op, ": keys must have at least one slot and the free one; got sizes ", to_text(a.keys.sizes()));
  if (rank == 4) {
    check_sizes(op, "keys", a.keys, {batch, heads, rows, dim}, "[B, H, N + 1, D]");
    check_sizes(op, "values", a.values, {batch, heads, rows, value_dim}, "[B, H, N + 1, Dv]");
    check_sizes(op, "facts", a.facts, {kFacts, batch, heads, rows}, "[4, B, H, N + 1]");
    check_sizes(op, "positions", a.positions, {batch, heads, rows}, "[B, H, N + 1]");
  } else {
    check_sizes(op, "keys", a.keys, {batch, rows, dim}, "[B, rows, D]");
    check_sizes(op, "values", a.values, {batch, rows, value_dim}, "[B, rows, Dv]");
    check_sizes(op, "facts", a.facts, {kFacts, batch, rows}, "[4, B, rows]");
    check_sizes(op, "positions", a.positions, {batch, rows}, "[B, rows]");
    check_sizes(op, "head_layout", *a.head_layout, {heads, 4}, "[H, 4]");
    check_type(op, "head_layout", *a.head_layout, ScalarType::Int);
    FSDC_CHECK(a.head_layout->is_contiguous(), op, ": head_layout must be contiguous; got strides ",
               to_text(a.head_layout->strides()));
  }
  check_like_query(op, "keys", a.keys, a.query);
  check_like_query(op, "values", a.values, a.query);
  check_type(op, "facts", a.facts, ScalarType::Float);
  check_contiguous_rows(op, "facts", a.facts);
  check_type(op, "positions", a.positions, ScalarType::Int);
  check_contiguous_rows(op, "positions", a.positions);
  check_sizes(op, "seen", a.seen, {batch}, "[B]");
  check_type(op, "seen", a.seen, ScalarType::Int);
}

inline void check_decode_attention(const DecodeArguments& a) {
  const char* op = "decode_attention_";
  check_rank(op, "query", a.query, 4, "[B, Hq, 1, D]");
  check_floating(op, "query", a.query);
  check_rank(op, "new_keys", a.new_keys, 4, "[B, H, 1, D]");
  check_rank(op, "new_values", a.new_values, 4, "[B, H, 1, Dv]");
  const int64_t batch = a.query.size(0), query_heads = a.query.size(1), heads = a.new_keys.size(1);
  check_sizes(op, "query", a.query, {batch, query_heads, 1, a.query.size(3)}, "[B, Hq, 1, D]");
  check_sizes(op, "new_keys", a.new_keys, {batch, heads, 1, a.query.size(3)}, "[B, H, 1, D]");
  check_sizes(op, "new_values", a.new_values, {batch, heads, 1, a.new_values.size(3)}, "[B, H, 1, Dv]");
  FSDC_CHECK(heads == 0 ? query_heads == 0 : query_heads > 0 && query_heads % heads == 0, op,
             ": query must have a multiple of the ", heads, " KV heads; got ", query_heads, " heads");
  check_contiguous_rows(op, "query", a.query);
  check_like_query(op, "new_keys", a.new_keys, a.query);
  check_like_query(op, "new_values", a.new_values, a.query);
  check_slots(op, a, batch, heads);
  check_entry(op, a, batch, heads);
  if (a.valid.has_value()) {
    check_sizes(op, "valid", *a.valid, {batch}, "[B]");
    check_type(op, "valid", *a.valid, ScalarType::Bool);
  }
  if (a.is_protected.has_value()) {
    check_sizes(op, "protected", *a.is_protected, {batch}, "[B]");
    check_type(op, "protected", *a.is_protected, ScalarType::Bool);
  }
  if (a.sinks.has_value()) {
    check_sizes(op, "sinks", *a.sinks, {query_heads}, "[Hq]");
    check_floating(op, "sinks", *a.sinks);
    check_contiguous_rows(op, "sinks", *a.sinks);
  }
  FSDC_CHECK(a.length >= 0, op, ": length must be at least 0; got ", a.length);
  FSDC_CHECK(a.sink_tokens >= 0 && a.recent_tokens >= 0, op, ": sink_tokens and recent_tokens must be at least 0; got ",
             a.sink_tokens, " and ", a.recent_tokens);
  FSDC_CHECK(!a.softcap.has_value() || *a.softcap > 0, op, ": softcap must be above 0; got ", *a.softcap);

  const std::initializer_list<Argument> written = {{"keys", &a.keys},
                                                   {"values", &a.values},
                                                   {"facts", &a.facts},
                                                   {"positions", &a.positions},
                                                   {"seen", &a.seen},
                                                   {"skipped_keys", pointer(a.skipped_keys)},
                                                   {"lost", pointer(a.lost)},
                                                   {"skipped_values", pointer(a.skipped_values)},
                                                   {"skipped_count", pointer(a.skipped_count)}};
  const std::initializer_list<Argument> read = {{"query", &a.query},
                                                {"new_keys", &a.new_keys},
                                                {"valid", pointer(a.valid)},
                                                {"new_values", &a.new_values},
                                                {"sinks", pointer(a.sinks)},
                                                {"protected", pointer(a.is_protected)},
                                                {"head_layout", pointer(a.head_layout)}};
  for (const auto& arguments : {written, read}) {
    for (const Argument& argument : arguments) {
      if (argument.tensor != nullptr) check_same_device(op, argument.name, *argument.tensor, "query", a.query);
    }
  }
  check_no_overlap(op, written, read);
}

// The most slots that a head has. On the CPU, where it can be read, the layout is checked too.
inline int64_t most_slots(const DecodeArguments& a) {
  if (!a.head_layout.has_value()) return a.keys.size(2) - 1;
  if (!a.query.is_cpu()) return a.keys.size(1) - 1;
  const int32_t* layout = a.head_layout->const_data_ptr<int32_t>();
  int64_t most = 1, next = 0;
  for (int64_t head = 0; head < a.head_layout->size(0); ++head, layout += 4) {
    const bool fits = layout[0] >= next && layout[1] >= 1 && int64_t{layout[0]} + layout[1] + 1 <= a.keys.size(1);
    FSDC_CHECK(fits && layout[2] >= 0 && layout[3] >= 0, "decode_attention_: head_layout must hold (first row, slots, ",
               "sink tokens, recent tokens) of heads one behind the other within the ", a.keys.size(1),
               " rows of keys; got ", to_text(std::vector<int64_t>(layout, layout + 4)), " for head ", head);
    most = std::max<int64_t>(most, layout[1]);
    next = int64_t{layout[0]} + layout[1] + 1;
  }
  return most;
}

inline TokenInput token_input(const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(), .batch_stride = tensor.stride(0), .head_stride = tensor.stride(1)};
}

inline SlotRows slot_rows(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {.data = tensor.mutable_data_ptr(),
          .batch_stride = strides[0],
          .head_stride = strides.size() == 4 ? strides[1] : 0,
          .slot_stride = strides[strides.size() - 2],
          .dim = tensor.size(static_cast<int64_t>(strides.size()) - 1)};
}

template <class Backend>
Tensor decode_attention(Tensor query, Tensor new_keys, Tensor new_values, Tensor keys, Tensor values, Tensor facts,
                        Tensor positions, Tensor seen, int64_t length, double scaling, double decay, double prior,
                        double redundancy, bool value_weight, int64_t sink_tokens, int64_t recent_tokens,
                        std::optional<double> softcap, std::optional<Tensor> sinks, std::optional<Tensor> valid,
                        std::optional<Tensor> is_protected, std::optional<Tensor> head_layout,
                        std::optional<Tensor> skipped_keys, std::optional<Tensor> skipped_values,
                        std::optional<Tensor> skipped_count, std::optional<Tensor> lost, bool skipped_mean) {
  const DecodeArguments arguments{query,        new_keys,    new_values,    keys,           values,        facts,
                                  positions,    seen,        length,        scaling,        decay,         prior,
                                  redundancy,   sink_tokens, recent_tokens, softcap,        sinks,         valid,
                                  is_protected, head_layout, skipped_keys,  skipped_values, skipped_count, lost};
  check_decode_attention(arguments);
  const int64_t slots = most_slots(arguments);
  const Backend backend(query);
  const int64_t batch = query.size(0), heads = new_keys.size(1);
  const Tensor output =
      torch::stable::new_empty(query, std::vector{batch, query.size(1), int64_t{1}, new_values.size(3)});
  if (batch == 0 || heads == 0) return output;
  const bool is_equal = !head_layout.has_value();
  const DecodeAttentionParams params{
      .batch = batch,
      .heads = heads,
      .group = query.size(1) / heads,
      .length = length,
      .slots = slots,
      .dtype = to_dtype(query.scalar_type()),
      .heads_layout = is_equal ? nullptr : head_layout->const_data_ptr<int32_t>(),
      .layout_rows = is_equal ? 0 : keys.size(1),
      .sink_tokens = sink_tokens,
      .recent_tokens = recent_tokens,
      .query = token_input(query),
      .new_keys = token_input(new_keys),
      .new_values = token_input(new_values),
      .keys = slot_rows(keys),
      .values = slot_rows(values),
      .facts = facts.mutable_data_ptr<float>(),
      .fact_plane_stride = facts.stride(0),
      .fact_batch_stride = facts.stride(1),
      .fact_head_stride = is_equal ? facts.stride(2) : 0,
      .positions = positions.mutable_data_ptr<int32_t>(),
      .position_batch_stride = positions.stride(0),
      .position_head_stride = is_equal ? positions.stride(1) : 0,
      .seen = seen.mutable_data_ptr<int32_t>(),
      .seen_stride = seen.stride(0),
      .valid = valid.has_value() ? valid->const_data_ptr<bool>() : nullptr,
      .valid_stride = valid.has_value() ? valid->stride(0) : 0,
      .is_protected = is_protected.has_value() ? is_protected->const_data_ptr<bool>() : nullptr,
      .protected_stride = is_protected.has_value() ? is_protected->stride(0) : 0,
      .scaling = scaling,
      .softcap = softcap.value_or(0),
      .sinks = sinks.has_value() ? sinks->const_data_ptr() : nullptr,
      .sinks_dtype = sinks.has_value() ? to_dtype(sinks->scalar_type()) : DType::kFloat32,
      .decay = static_cast<float>(decay),
      .prior = static_cast<float>(prior),
      .value_weight = value_weight,
      .redundancy = static_cast<float>(redundancy),
      .skipped_keys = skipped_keys.has_value() ? skipped_keys->mutable_data_ptr() : nullptr,
      .skipped_values = skipped_values.has_value() ? skipped_values->mutable_data_ptr() : nullptr,
      .skipped_count = skipped_count.has_value() ? skipped_count->mutable_data_ptr<int32_t>() : nullptr,
      .lost = lost.has_value() ? lost->mutable_data_ptr<float>() : nullptr,
      .skipped_mean = skipped_mean,
      .output = output.mutable_data_ptr()};
  backend.decode_attention(params);
  return output;
}

}  // namespace fsdc
