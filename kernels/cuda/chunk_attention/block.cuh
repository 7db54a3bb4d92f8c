// SPDX-License-Identifier: Apache-2.0
// What chunk_attention has in hand at a time, and which of its tokens a query sees.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/chunk_attention.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/element.cuh"

namespace fsdc::cuda {

// Some queries of some rows with the tokens that they see. Lanes are the query heads of a KV head's group, query after
// query: lane m of a row is query m / G, query head m % G.
struct ChunkBlock {
  int64_t rows = 0;
  int64_t first_row = 0;    // counted b * H + h
  int64_t row_step = 1;     // 1, or H where KV heads are taken one by one
  int64_t first_token = 0;  // of the head, where heads lie flat
  int64_t held = 0;         // T of these rows
  int64_t first_query = 0;
  int64_t queries = 0;
  int64_t tokens = 0;       // that these queries see at most
  int64_t stride = 0;       // of `logits` and `weights` from lane to lane, a multiple of kChunkStride
  void* logits = nullptr;   // [rows, queries * G, stride], Accumulator
  void* weights = nullptr;  // the same of Element: exponentials. Where the types are one, the memory is

  FSDC_HOST_DEVICE int64_t row_at(int64_t place) const { return first_row + place * row_step; }
};

constexpr int64_t kChunkStride = 8;  // rows of logits begin at multiples of 16 bytes, of any type

// What is known of a lane, [B * H, Q * G] for the whole call.
template <class Number>
struct alignas(16) Lane {
  Number from;   // what is subtracted from its logits: the largest of them
  Number scale;  // 1 over the softmax's denominator; 0 where it sees nothing
  Number vote;   // scale times the query's weight; 0 where it does not vote
  Number entry;  // the logit of the evicted tokens' entry, then its probability
};

// Where a row's part of what belongs to tokens begins.
struct ChunkRow {
  int64_t batch;
  int64_t head;
  int64_t first_token;

  __device__ ChunkRow(const ChunkAttentionParams& params, int64_t row, int64_t first)
      : batch(row / params.heads), head(row % params.heads), first_token(first) {}

  template <class Element>
  __device__ const Element* vectors(const TokenVectors& from) const {
    return static_cast<const Element*>(from.data) + batch * from.batch_stride + head * from.head_stride +
           first_token * from.token_stride;
  }
  __device__ float* facts(const ChunkAttentionParams& params, int64_t plane) const {
    return params.facts + plane * params.fact_plane_stride + batch * params.fact_batch_stride +
           head * params.fact_head_stride + first_token;
  }
  // Null where no token is missing.
  __device__ const int32_t* positions(const ChunkAttentionParams& params) const {
    if (params.positions == nullptr) return nullptr;
    return params.positions + batch * params.position_batch_stride + head * params.position_head_stride + first_token;
  }
  __device__ float query_weight(const ChunkAttentionParams& params, int64_t query) const {
    if (params.query_weights == nullptr) return 1;
    return __ldg(params.query_weights + batch * params.query_weight_batch_stride +
                 query * params.query_weight_query_stride);
  }
};

// Of one row.
struct Sight {
  const int32_t* positions;
  const bool* sees;
  int64_t sees_query_stride;
  int64_t sees_token_stride;
  int64_t held;

  __device__ Sight(const ChunkAttentionParams& params, const ChunkRow& row, int64_t held)
      : positions(row.positions(params)),
        sees(params.sees == nullptr ? nullptr : params.sees + row.batch * params.sees_batch_stride),
        sees_query_stride(params.sees_query_stride),
        sees_token_stride(params.sees_token_stride),
        held(held) {}

  __device__ bool is_there(int64_t token) const { return positions == nullptr || __ldg(positions + token) >= 0; }

  // Of a token that is there.
  __device__ bool is_seen(int64_t query, int64_t token) const {
    if (token < held) return true;
    if (sees == nullptr) return token - held <= query;
    return sees[query * sees_query_stride + (token - held) * sees_token_stride];
  }

  // The first lane of a block that may see the token; without `sees` it does, and so do all after it.
  __device__ int first_lane(const ChunkBlock& block, int64_t group, int64_t token) const {
    if (token >= block.tokens || !is_there(token)) return std::numeric_limits<int>::max();
    if (sees != nullptr || token < held) return 0;
    return static_cast<int>(max(token - held - block.first_query, int64_t{0}) * group);
  }
};

template <class Number>
__device__ Number minus_infinity() {
  return static_cast<Number>(-INFINITY);
}

// From a product of a query and a key to a logit.
template <class Number>
struct LogitRule {
  Number scaling;
  Number softcap;  // 0: none
  Number part_of_softcap;

  __device__ explicit LogitRule(const ChunkAttentionParams& params)
      : scaling(static_cast<Number>(params.scaling)),
        softcap(static_cast<Number>(params.softcap)),
        part_of_softcap(1 / softcap) {}

  __device__ Number operator()(Number product) const {
    const Number logit = product * scaling;
    return softcap == 0 ? logit : softcap * hyperbolic_tangent(logit * part_of_softcap);
  }
};

}  // namespace fsdc::cuda
