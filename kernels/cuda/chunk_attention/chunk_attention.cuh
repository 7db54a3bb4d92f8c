// SPDX-License-Identifier: Apache-2.0
// How the kernels of chunk_attention.cu (see there) and the products between them make one operator.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cuda/products.h"
#include "plan.h"
#include "redundancy.cuh"
#include "softmax.cuh"
#include "vectors.cuh"
#include "votes.cuh"

namespace fsdc::cuda {

constexpr int kChunkThreads = 256;  // per block, as shipped; tests run smaller ones too

template <class Element>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::kFloat64;
}
template <>
constexpr DType dtype_of<__half>() {
  return DType::kFloat16;
}
template <>
constexpr DType dtype_of<__nv_bfloat16>() {
  return DType::kBFloat16;
}

// One call, for one type of elements. Whatever fails first is what run() returns, and nothing is launched after it.
template <class Element, int kThreads>
class ChunkAttention {
  using Number = Accumulator<Element>;
  static constexpr DType kElement = dtype_of<Element>(), kNumber = dtype_of<Number>();

 public:
  ChunkAttention(const ChunkAttentionParams& params, const ChunkLimits& limits, Products& products, cudaStream_t stream)
      : p_(params), limits_(limits), products_(products), stream_(stream) {}

  cudaError_t run() {
    const int64_t lanes = p_.batch * p_.heads * p_.group * p_.queries;
    if (lanes == 0) return cudaSuccess;
    queries_ = memory<Element>(lanes * p_.query.dim);
    lanes_ = memory<Lane<Number>>(lanes);
    sums_ = memory<Number>(lanes * p_.values.dim);
    const std::vector<ChunkBlock> runs = runs_of_rows();
    make_room(runs);
    launch_warps(take_queries_kernel<Element, kThreads>, lanes, queries_, lanes_);
    for (const ChunkBlock& run : runs) {
      in_blocks_of(attending(run), run, [&](ChunkBlock& block) { attend(block); });
      if (p_.redundancy) in_blocks_of(comparing(run), run, [&](ChunkBlock& block) { compare(block); });
    }
    launch_warps(write_outputs_kernel<Element, kThreads>, lanes, sums_, lanes_);
    if (p_.lost != nullptr) launch_blocks(lost_kernel<Number, kThreads>, p_.batch * p_.heads, lanes_);
    return error_;
  }

 private:
  // Rows that hold equally many tokens and lie at equal distances: all, or those of each KV head.
  std::vector<ChunkBlock> runs_of_rows() const {
    if (!takes_heads_alone(p_)) return {{.rows = p_.batch * p_.heads, .held = p_.held}};
    std::vector<ChunkBlock> runs;
    for (int64_t head = 0; head < p_.heads; ++head) {
      ChunkBlock run{.rows = p_.batch, .first_row = head, .row_step = p_.heads, .held = p_.held};
      if (p_.head_layout != nullptr) {
        run.first_token = p_.head_layout[2 * head];
        run.held = p_.head_layout[2 * head + 1];
      }
      runs.push_back(run);
    }
    return runs;
  }

  ChunkPlan attending(const ChunkBlock& run) const {
    return {run.rows, p_.queries, p_.group, run.held + p_.queries, limits_};
  }
  ChunkPlan comparing(const ChunkBlock& run) const { return {run.rows, p_.queries, 1, run.held + p_.queries, limits_}; }

  template <class Body>
  void in_blocks_of(const ChunkPlan& plan, const ChunkBlock& run, const Body& body) {
    for (int64_t row = 0; row < run.rows; row += plan.rows) {
      ChunkBlock block = run;
      block.first_row = run.row_at(row);
      block.rows = std::min(plan.rows, run.rows - row);
      for (block.first_query = 0; block.first_query < p_.queries; block.first_query += plan.queries) {
        block.queries = std::min(plan.queries, p_.queries - block.first_query);
        body(block);
      }
    }
  }

  void attend(ChunkBlock& block) {
    const int64_t all = block.held + p_.queries, lanes = block.queries * p_.group;
    if (block.first_query == 0 && values_ != nullptr) {
      launch_warps(take_values_kernel<Element, kThreads>, block.rows * all, block, values_);
    }
    block.tokens = p_.sees == nullptr ? block.held + block.first_query + block.queries : all;
    place(block);
    multiply(lanes_of(block, queries_, p_.query.dim), transposed(tokens_of(block, p_.keys, 0, block.tokens)),
             matrices(block.logits, kNumber, block.rows, lanes, block.tokens, block.stride));
    launch_blocks(softmax_kernel<Number, kThreads>, block.rows * lanes, block, lanes_);
    const int64_t voted = block.first_query == 0 && p_.facts != nullptr ? all : block.tokens;
    launch_blocks(vote_kernel<Element, kThreads>, block.rows * tiles_of(voted), block, lanes_, voted);
    multiply(matrices(block.weights, kElement, block.rows, lanes, block.tokens, block.stride), values_of(block),
             lanes_of(block, sums_, p_.values.dim));
  }

  void compare(ChunkBlock& block) {
    block.tokens = block.held + block.first_query + block.queries;
    place(block);
    multiply(tokens_of(block, p_.keys, block.held + block.first_query, block.queries),
             transposed(tokens_of(block, p_.keys, 0, block.tokens)),
             matrices(block.logits, kNumber, block.rows, block.queries, block.tokens, block.stride));
    launch_blocks(raise_redundancy_kernel<Number, kThreads>, block.rows * tiles_of(block.tokens), block);
  }

  // ---- operands ------------------------------------------------------------------------------------------------------

  static Matrices matrices(void* data, DType dtype, int64_t count, int64_t rows, int64_t columns, int64_t row_stride) {
    return {data, dtype, count, rows, columns, rows * row_stride, row_stride, 1};
  }
  static Matrices transposed(Matrices of) {
    std::swap(of.rows, of.columns);
    std::swap(of.row_stride, of.column_stride);
    return of;
  }

  // The block's lanes of what is [B * H, Q * G, dim].
  template <class T>
  Matrices lanes_of(const ChunkBlock& block, T* data, int64_t dim) const {
    const int64_t of_row = p_.queries * p_.group;
    Matrices lanes = matrices(data + (block.first_row * of_row + block.first_query * p_.group) * dim, dtype_of<T>(),
                              block.rows, block.queries * p_.group, dim, dim);
    lanes.matrix_stride = block.row_step * of_row * dim;
    return lanes;
  }

  // Some tokens of the block's rows.
  Matrices tokens_of(const ChunkBlock& block, const TokenVectors& vectors, int64_t first, int64_t count) const {
    const int64_t at = block.first_row / p_.heads * vectors.batch_stride +
                       block.first_row % p_.heads * vectors.head_stride +
                       (block.first_token + first) * vectors.token_stride;
    const bool by_head = block.row_step == 1 && p_.heads > 1;
    return {const_cast<Element*>(static_cast<const Element*>(vectors.data) + at),
            kElement,
            block.rows,
            count,
            vectors.dim,
            by_head ? vectors.head_stride : vectors.batch_stride,
            vectors.token_stride,
            1};
  }

  // As they lie, or where tokens may be missing the copy without what lies there.
  Matrices values_of(const ChunkBlock& block) const {
    if (values_ == nullptr) return tokens_of(block, p_.values, 0, block.tokens);
    Matrices values = matrices(values_, kElement, block.rows, block.tokens, p_.values.dim, p_.values.dim);
    values.matrix_stride = (block.held + p_.queries) * p_.values.dim;
    return values;
  }

  void multiply(const Matrices& left, const Matrices& right, const Matrices& product) {
    if (error_ == cudaSuccess && product.columns > 0) products_.multiply(left, right, product);
  }

  // ---- memory --------------------------------------------------------------------------------------------------------

  template <class T>
  T* memory(int64_t count) {
    return static_cast<T*>(products_.memory(count * static_cast<int64_t>(sizeof(T))));
  }

  static int64_t stride_of(int64_t tokens) { return (tokens + kChunkStride - 1) / kChunkStride * kChunkStride; }

  // For the largest block of any run.
  void make_room(const std::vector<ChunkBlock>& runs) {
    int64_t weights = 0, logits = 0, values = 0;
    for (const ChunkBlock& run : runs) {
      const int64_t tokens = run.held + p_.queries;
      const ChunkPlan plan = attending(run), other = comparing(run);
      weights = std::max(weights, plan.rows * plan.queries * p_.group * stride_of(tokens));
      logits = std::max(logits, weights);
      if (p_.redundancy) logits = std::max(logits, other.rows * other.queries * stride_of(tokens));
      values = std::max(values, plan.rows * tokens * p_.values.dim);
    }
    logits_ = memory<Number>(logits);
    if constexpr (kElement != kNumber) weights_ = memory<Element>(weights);
    if (p_.positions != nullptr) values_ = memory<Element>(values);
  }

  void place(ChunkBlock& block) const {
    block.stride = stride_of(block.tokens);
    block.logits = logits_;
    block.weights = logits_;
    if constexpr (kElement != kNumber) block.weights = weights_;
  }

  // ---- launches ------------------------------------------------------------------------------------------------------

  static int64_t tiles_of(int64_t tokens) { return (tokens + kTokensOfBlock - 1) / kTokensOfBlock; }

  template <class... Parameters, class... Arguments>
  void launch_blocks(void (*kernel)(ChunkAttentionParams, Parameters...), int64_t blocks,
                     const Arguments&... arguments) {
    if (error_ == cudaSuccess && blocks > std::numeric_limits<int32_t>::max()) error_ = cudaErrorInvalidValue;
    if (error_ != cudaSuccess || blocks == 0) return;
    const Grid grid{.blocks = static_cast<unsigned>(blocks), .threads = kThreads};
    error_ = launch(kernel, grid, stream_, p_, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void launch_warps(void (*kernel)(ChunkAttentionParams, Parameters...), int64_t warps, const Arguments&... arguments) {
    constexpr int64_t kWarps = kThreads / kWarpThreads;
    launch_blocks(kernel, (warps + kWarps - 1) / kWarps, arguments...);
  }

  const ChunkAttentionParams& p_;
  const ChunkLimits limits_;
  Products& products_;
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
  Element* queries_ = nullptr;     // [B * H, Q * G, D]
  Lane<Number>* lanes_ = nullptr;  // [B * H, Q * G]
  Number* sums_ = nullptr;         // [B * H, Q * G, Dv]: of the values, before they are scaled
  Number* logits_ = nullptr;       // of a block, and so are the next
  Element* weights_ = nullptr;
  Element* values_ = nullptr;  // null: they are taken as they lie
};

template <int kThreads>
cudaError_t run_chunk_attention(const ChunkAttentionParams& params, const ChunkLimits& limits, Products& products,
                                cudaStream_t stream) {
  return with_element(params.dtype, [&](auto element) {
    return ChunkAttention<typename decltype(element)::type, kThreads>(params, limits, products, stream).run();
  });
}

}  // namespace fsdc::cuda
