// SPDX-License-Identifier: Apache-2.0
// chunk_attention: many new tokens attend to the tokens held and to each other, and add that attention to the scores.
// Definition: kernels/chunk_attention.h.
#include "chunk_attention.cuh"
#include "kernels/cuda/launch.h"

namespace fsdc::cuda {

cudaError_t launch_chunk_attention(const ChunkAttentionParams& params, const ChunkLimits& limits, Products& products,
                                   cudaStream_t stream) {
  return run_chunk_attention<kChunkThreads>(params, limits, products, stream);
}

cudaError_t launch_chunk_attention(const ChunkAttentionParams& params, Products& products, cudaStream_t stream) {
  return launch_chunk_attention(params, ChunkLimits{}, products, stream);
}

}  // namespace fsdc::cuda
