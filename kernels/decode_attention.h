// SPDX-License-Identifier: Apache-2.0
// decode_attention: one new token for every row of a cache of fixed size: attend to the slots and to the new token, add
// the attention to the scores, raise redundancy, and put the new token in the place of the one that goes.
//
// With S tokens seen before and N_h slots, KV head h has T_h = min(S, N_h) slots in use. For each (batch, KV head):
//
//   l[g, j] = q[g] . k[j] * scaling, softcap * tanh(l / softcap) if there is one          j: the slots in use, and new
//   p       = softmax of l over the tokens, the attention sinks and the entry of the evicted
//   out[g]  = sum over j of p[g, j] * v[j], and p[g, entry] times the entry's value
//   s[j]   <- decay * s[j] + sum over g of p[g, j]                                        left as it is if not finite
//   r[j]   <- max(r[j], cosine of k[j] and the new key)                                   if redundancy > 0
//
// The new token begins with s = 0 (+inf if the user protects it) and r = 0. It goes to slot T_h while there is one;
// after that to the slot of the least by eviction score, which may be itself, and the evicted token is added to the
// entry. Eviction score, protection and order: docs/eviction.md; the specification is reference.decode_attention_.
//
// An empty slot has position -1 and score -inf and contributes nothing whatever bytes it holds. A padded row is left
// bitwise as it was and its output is zero. Sums are fp32 (fp64 for fp64), in an order that depends on shapes and the
// instruction set or device only: the same bits on every run and for any number of threads.
#pragma once

#include "types.h"

namespace fsdc {

// The planes of `facts`.
enum Fact : int64_t { kScores, kValueWeights, kRedundancy, kKeyScales, kFacts };

// Slots of one kind, [B, H, N + 1, D] with a contiguous last dimension; of unequal heads [B, rows, D].
struct SlotRows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;  // unused with `heads_layout`
  int64_t slot_stride;
  int64_t dim;
};

// The query or the new token's key or value, [B, heads, 1, D] with a contiguous last dimension.
struct TokenInput {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
};

struct DecodeAttentionParams {
  int64_t batch;   // B
  int64_t heads;   // H
  int64_t group;   // G
  int64_t length;  // S, tokens seen before, padding included
  int64_t slots;   // N, of the largest head; of unequal ones it may be more
  DType dtype;     // of query, keys and values

  // Per head {first row, N_h, sink tokens, recent tokens}, [H, 4]; null: every head has N slots, see below.
  const int32_t* heads_layout;
  int64_t layout_rows;    // of a batch row with it: N_h + 1 of each head, at least
  int64_t sink_tokens;    // the first positions, never evicted
  int64_t recent_tokens;  // the last positions, never evicted

  TokenInput query;       // [B, H * G, 1, D]
  TokenInput new_keys;    // [B, H, 1, D]
  TokenInput new_values;  // [B, H, 1, Dv]
  SlotRows keys;
  SlotRows values;
  float* facts;  // [kFacts, B, H, N + 1], last dimension contiguous
  int64_t fact_plane_stride;
  int64_t fact_batch_stride;
  int64_t fact_head_stride;
  int32_t* positions;  // [B, H, N + 1], last dimension contiguous
  int64_t position_batch_stride;
  int64_t position_head_stride;
  int32_t* seen;  // [B]: real tokens seen, the position of the new one
  int64_t seen_stride;
  const bool* valid;  // [B]: false for padding; null: all true
  int64_t valid_stride;
  const bool* is_protected;  // [B]: the user protects the new token; null: none
  int64_t protected_stride;

  double scaling;     // of fp64 in fp64
  double softcap;     // 0: none
  const void* sinks;  // attention sinks [H * G], contiguous; null: none
  DType sinks_dtype;

  float decay;  // gamma
  float prior;  // p, per query head
  bool value_weight;
  float redundancy;  // rho

  // The entry of the evicted tokens, contiguous; null: none. Sums are fp32, fp64 for fp64.
  void* skipped_keys;      // [B, H, D]
  void* skipped_values;    // [B, H, Dv]
  int32_t* skipped_count;  // [B, H]
  float* lost;             // [B, H]: share of this step's attention that the entry received
  bool skipped_mean;       // it counts as n tokens of their mean; false: as one, their literal sum

  void* output;  // [B, H * G, 1, Dv] contiguous
};

}  // namespace fsdc
