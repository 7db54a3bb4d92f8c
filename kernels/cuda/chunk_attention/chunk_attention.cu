// SPDX-License-Identifier: Apache-2.0
// chunk_attention: many new tokens attend to the tokens held and to each other, and add that attention to the scores.
// Definition: kernels/chunk_attention.h.
//
// In      query [B, H * G, Q, D], keys [B, H, S, D], values [B, H, S, Dv] of 4 types, and what goes with them
// In/out  scores and redundancy, [B, H, S] f32 each; out: output [B, H * G, Q, Dv], lost [B, H]
// How     attention is two products, which are cuBLAS's, in blocks of 128 queries; what lies between them is ours. For
//         each block: logits = queries * keys, in fp32 (products.h); the softmax of each lane in one reading of them
//         (softmax.cuh); then exponentials in their place, and on the way the votes, sums over lanes (votes.cuh); and
//         sums = exponentials * values. Before and after that vectors in and out (vectors.cuh): queries lane by lane,
//         values without what lies in empty slots, outputs scaled, with the share of the evicted tokens' entry. A third
//         product, new keys * keys, makes the redundancy (redundancy.cuh)
// Bytes   with L logits in all, about B H G Q (T + Q / 2 + 64): ours read 4 L twice and write `size` L, products write
//         4 L and read `size` L; in fp64 8 for 4. Redundancy: B H Q (T + Q / 2) products, written and read, 8 bytes
// Floor   B = 1, H = 8, G = 4, T = Q = 1024, D = 128 bf16: L = 52 million; ours 524 MB, 157 us at the 3.35 TB/s of an
//         H100, 94 us where the second reading of a block comes from its second-level cache; products 315 MB, 94 us
// Share   of a prompt of an 8B model (32 layers, width 4096, MLP 14336) with C = 1024 in chunks of 1024: its weights are
//         2 * 6.98e9 * 1024 = 14.3 TFLOP a chunk, 20.4 ms at 700 TFLOP/s. Attention in 32 layers: ours 5.0 ms (3.0 from
//         cache), the two products 3.0 ms, redundancy 1.1 ms. Of 29.6 ms ours are 17 % (10 %): below the 20 % from which
//         column sums by tensor cores beside a flash attention would be written. That could save 7.9 ms at the very most
// Memory  a block's logits, 32 MB in fp32 at most (or a query's, if that is more), 16 for its exponentials in 16 bits;
//         queries once more, outputs in fp32; values of a block's rows where tokens may be missing
// Launch  per block of queries 2 kernels and 2 products, 1 and 1 more for redundancy; in all 2 or 3 more. 256 threads:
//         softmax a block per lane, votes and redundancy one per 64 tokens of a row, of which the warps share the lanes;
//         vectors a warp each. At most 64 registers (128 in fp64): 4 blocks per SM, 50 % occupancy
// Order   deterministic: blocks depend on shapes, a lane's sum on its threads, votes add lanes warp by warp, then block
//         by block. Products are LibTorch's bmm, with its settings (TF32), and repeat their bits as cuBLAS does
// Limits  2^31 - 1 blocks: else cudaErrorInvalidValue. Heads that hold different numbers of tokens, and rows (b, h) at
//         uneven distances, are taken head by head
// Tested  tests/cuda, on the CPU thread by thread (docs/cuda_without_gpu.md), with products by loops; compiled for every
//         architecture. Not timed on a device yet: how large blocks are waits for that
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
