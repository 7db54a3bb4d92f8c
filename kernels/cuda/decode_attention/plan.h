// SPDX-License-Identifier: Apache-2.0
// How the tokens of a launch of decode_attention are cut into runs, and where a block keeps what, decided by shapes and
// by what the device has.
#pragma once

#include <algorithm>
#include <bit>

#include "kernels/cuda/device.h"
#include "kernels/decode_attention.h"

namespace fsdc::cuda {

// The tokens of a row, those in use and then the new one, are cut into runs; a block attends to one of them. Either the
// runs of a row are the blocks of a cluster, one of them perhaps, or, split, there are two launches: the blocks of the
// first leave their runs in memory of the device, and one block for each row in the second merges them.
struct DecodePlan {
  uint32_t cluster = 1;    // 1, 2, 4 or 8
  bool is_split = false;   // any number of runs per row
  int64_t run_tokens = 1;  // of each run but the last of its row
};

// What a block of the second launch finds of a run, and its peers in its shared memory: numbers of the accumulator, one
// part behind the other.
struct DecodeRunLayout {
  int64_t outputs;       // [G, Dv]: sum of exponentials times values, at 0
  int64_t maxima;        // [G]; of a split row, its scales once they are known
  int64_t sums;          // [G]: of the exponentials
  int64_t entry_logits;  // [G], of the first run: of the entry of the evicted
  int64_t logits;        // [G + 1, run_tokens]: of the queries, then exponentials; products with the new key
  int64_t numbers;       // of all
};

// The shared memory of a block, likewise.
struct DecodeSharedLayout {
  int64_t rows;        // [G + 1, row_stride]: scaled queries, then the new key; zeros behind; at 0
  int64_t row_stride;  // D in whole column blocks
  int64_t partials;    // [2, warps, columns of a block of values]
  int64_t warp_facts;  // [2, warps, G]: maxima and sums of the warps
  int64_t scales;      // [cluster, G]: what the exponentials of a run are multiplied with to be probabilities
  int64_t shares;      // [G]: the probability of the entry
  int64_t run;         // a run, as above
  int64_t numbers;
};

// Lanes that share the elements of a token, `pack` at a time: a power of two.
inline int lanes_of(int64_t dim, int pack) {
  const int64_t packs = std::clamp<int64_t>((dim + pack - 1) / pack, 4, 32);
  return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(packs)));
}

// Elements of an access of 16 bytes, or 1 where that is not aligned, and in fp64.
inline int pack_of(const DecodeAttentionParams& params) {
  const int64_t bytes = element_size(params.dtype);
  if (params.dtype == DType::kFloat64) return 1;
  uint64_t bits = 0;
  for (const SlotRows& rows : {params.keys, params.values}) {
    bits |= reinterpret_cast<uintptr_t>(rows.data);
    bits |= static_cast<uint64_t>((rows.batch_stride | rows.head_stride | rows.slot_stride | rows.dim) * bytes);
  }
  for (const TokenInput& token : {params.new_keys, params.new_values}) {
    bits |= reinterpret_cast<uintptr_t>(token.data);
    bits |= static_cast<uint64_t>((token.batch_stride | token.head_stride) * bytes);
  }
  return bits % 16 == 0 ? static_cast<int>(16 / bytes) : 1;
}

inline DecodeRunLayout run_layout(const DecodeAttentionParams& params, int64_t run_tokens) {
  const int64_t group = params.group;
  DecodeRunLayout at{};
  at.maxima = group * params.values.dim;
  at.sums = at.maxima + group;
  at.entry_logits = at.sums + group;
  at.logits = at.entry_logits + group;
  at.numbers = at.logits + (group + 1) * run_tokens;
  return at;
}

// Tokens of a row, and of all heads of a batch row: at most, where each head has slots of its own.
inline int64_t tokens_per_row(const DecodeAttentionParams& params) { return std::min(params.length, params.slots) + 1; }
inline int64_t tokens_per_batch_row(const DecodeAttentionParams& params) {
  const int64_t tokens = params.heads * tokens_per_row(params);
  return params.heads_layout == nullptr ? tokens : std::min(tokens, params.layout_rows);
}

inline int64_t runs_per_row(const DecodeAttentionParams& params, const DecodePlan& plan) {
  return plan.is_split ? (tokens_per_row(params) + plan.run_tokens - 1) / plan.run_tokens : plan.cluster;
}
inline int64_t runs_per_batch_row(const DecodeAttentionParams& params, const DecodePlan& plan) {
  if (params.heads_layout == nullptr) return params.heads * runs_per_row(params, plan);
  return tokens_per_batch_row(params) / plan.run_tokens + params.heads;  // the last run of each head is cut short
}

inline DecodeSharedLayout shared_layout(const DecodeAttentionParams& params, const DecodePlan& plan, int threads) {
  const int pack = pack_of(params), warps = threads / 32;
  const int64_t key_columns = int64_t{lanes_of(params.keys.dim, pack)} * pack;
  const int64_t value_columns = int64_t{lanes_of(params.values.dim, pack)} * pack;
  DecodeSharedLayout at{};
  at.row_stride = std::max<int64_t>((params.keys.dim + key_columns - 1) / key_columns, 1) * key_columns;
  at.partials = (params.group + 1) * at.row_stride;
  at.warp_facts = at.partials + 2 * warps * value_columns;
  at.scales = at.warp_facts + 2 * warps * params.group;
  at.shares = at.scales + plan.cluster * params.group;
  at.run = at.shares + params.group;
  at.numbers = at.run + run_layout(params, plan.run_tokens).numbers;
  return at;
}

inline int64_t accumulator_bytes(const DecodeAttentionParams& params) {
  return params.dtype == DType::kFloat64 ? 8 : 4;
}

inline int64_t shared_bytes(const DecodeAttentionParams& params, const DecodePlan& plan, int threads) {
  return shared_layout(params, plan, threads).numbers * accumulator_bytes(params);
}

// Bytes of device memory for the runs, of any content; 0 where they stay on chip.
inline int64_t scratch_bytes(const DecodeAttentionParams& params, const DecodePlan& plan) {
  if (!plan.is_split) return 0;
  return params.batch * runs_per_batch_row(params, plan) * run_layout(params, plan.run_tokens).numbers *
         accumulator_bytes(params);
}

// `seen` holds the position of a new token in so many bits, and above them how many heads have read it (finish.cuh).
inline uint32_t position_bits(const DecodeAttentionParams& params) {
  const auto counter_bits = static_cast<uint32_t>(std::bit_width(static_cast<uint64_t>(params.heads - 1)));
  return std::min(32 - counter_bits, uint32_t{31});
}

// Enough blocks to keep every multiprocessor loading, each with enough tokens to be worth it, and so few tokens that
// two blocks find room beside each other. A cluster where the device has them; but the blocks of a cluster end
// together, so where heads have slots of their own, rows are split: long heads get more blocks, not longer ones.
inline DecodePlan plan_decode_attention(const DecodeAttentionParams& params, const Device& device, int threads) {
  constexpr int64_t kLeastTokens = 64;       // that a block is worth
  constexpr int64_t kStaticBytes = 2 << 10;  // of the kernel, rounded up, and what the system takes
  constexpr uint32_t kMostInCluster = 8;
  const int64_t rows = params.batch * params.heads, tokens = tokens_per_row(params);
  const int64_t wanted = 2 * device.multiprocessors;  // blocks
  const auto runs_of = [&](int64_t count) { return (tokens + count - 1) / count; };
  const auto fits = [&](const DecodePlan& plan, int64_t bytes) {
    return shared_bytes(params, plan, threads) <= bytes - kStaticBytes;
  };
  const int64_t half = std::min(device.shared_bytes_per_block, device.shared_bytes_per_multiprocessor / 2);
  const bool is_equal = params.heads_layout == nullptr;

  if (is_equal && (device.largest_cluster > 1 || rows >= device.multiprocessors || tokens < 2 * kLeastTokens)) {
    DecodePlan plan{.run_tokens = tokens};
    while (plan.cluster * 2 <= std::min(device.largest_cluster, kMostInCluster)) {
      const bool has_idle = rows * plan.cluster * 2 <= wanted && tokens >= plan.cluster * 2 * kLeastTokens;
      if (!has_idle && fits(plan, half)) break;
      plan.cluster *= 2;
      plan.run_tokens = runs_of(plan.cluster);
    }
    if (fits(plan, device.shared_bytes_per_block)) return plan;
  }
  const int64_t all_tokens = params.batch * tokens_per_batch_row(params);
  DecodePlan plan{.is_split = true, .run_tokens = std::max((all_tokens + wanted - 1) / wanted, kLeastTokens)};
  plan.run_tokens = std::min(plan.run_tokens, tokens);
  const auto is_too_long = [&] {
    return plan.run_tokens > kLeastTokens ? !fits(plan, half) : !fits(plan, device.shared_bytes_per_block);
  };
  while (plan.run_tokens > 1 && is_too_long()) plan.run_tokens = (plan.run_tokens + 1) / 2;
  return plan;
}

}  // namespace fsdc::cuda
