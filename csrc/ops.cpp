// SPDX-License-Identifier: Apache-2.0
// Every operator of the library `fsdc`. csrc/NAME.h says what arguments are allowed, csrc/cpu and csrc/cuda register
// the implementations, python/fixed_size_kv_cache/operators/register.py the shapes for the compiler.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fsdc, m) {
  // The cache_size best-scored tokens of each KV head in ascending order, and their indices.
  m.def(
      "truncate(Tensor keys, Tensor values, Tensor scores, SymInt cache_size, *, bool include_skipped=False)"
      " -> (Tensor keys, Tensor values, Tensor indices)");

  // scores = carry * scores + sum over q and g of query_weights * weights
  m.def(
      "accumulate_scores_(Tensor(a!) scores, Tensor weights, Tensor? query_weights=None, Tensor? carry=None)"
      " -> ()");

  // One new token for every row of a cache: attends to the slots and to it, adds the attention to the scores, and puts
  // it in the place of the one that goes. The slots are [B, H, N + 1, ...], or [B, rows, ...] with a head_layout.
  m.def(
      "decode_attention_(Tensor query, Tensor new_keys, Tensor new_values, Tensor(a!) keys, Tensor(b!) values,"
      " Tensor(c!) facts, Tensor(d!) positions, Tensor(e!) seen, SymInt length, *, float scaling, float decay,"
      " float prior, float redundancy, bool value_weight, SymInt sink_tokens, SymInt recent_tokens,"
      " float? softcap=None, Tensor? sinks=None, Tensor? valid=None, Tensor? protected=None, Tensor? head_layout=None,"
      " Tensor(f!)? skipped_keys=None, Tensor(g!)? skipped_values=None, Tensor(h!)? skipped_count=None,"
      " Tensor(i!)? lost=None, bool skipped_mean=True) -> Tensor output");

  // Attention of many new tokens to the tokens held, [B, H, S, ...] with the new ones last, and to each other; it is
  // added to the scores. With a head_layout of unequal heads [B, rows, ...].
  m.def(
      "chunk_attention_(Tensor query, Tensor keys, Tensor values, *, float scaling, Tensor(a!)? facts=None,"
      " Tensor? positions=None, Tensor? query_weights=None, Tensor? carry=None, bool redundancy=False,"
      " Tensor? sees=None, float? softcap=None, Tensor? sinks=None, Tensor? head_layout=None,"
      " Tensor? skipped_keys=None, Tensor? skipped_values=None, Tensor? skipped_count=None, Tensor(b!)? lost=None,"
      " bool skipped_mean=True) -> Tensor output");
}
