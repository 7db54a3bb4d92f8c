// SPDX-License-Identifier: Apache-2.0
// Every operator of the library `fsdc`. csrc/NAME.h says what arguments are allowed, csrc/cpu and csrc/cuda register
// the implementations, python/fixed_size_kv_cache/_operators.py the shapes for the compiler.
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

  // Attention of many new tokens to the tokens held, [B, H, S, ...] with the new ones last, and to each other; it is
  // added to the scores. With a head_layout of unequal heads [B, rows, ...].
  m.def(
      "chunk_attention_(Tensor query, Tensor keys, Tensor values, *, float scaling, Tensor(a!)? facts=None,"
      " Tensor? positions=None, Tensor? query_weights=None, Tensor? carry=None, bool redundancy=False,"
      " Tensor? sees=None, float? softcap=None, Tensor? sinks=None, Tensor? head_layout=None,"
      " Tensor? skipped_keys=None, Tensor? skipped_values=None, Tensor? skipped_count=None, Tensor(b!)? lost=None,"
      " bool skipped_mean=True) -> Tensor output");
}
