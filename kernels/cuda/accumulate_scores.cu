// SPDX-License-Identifier: Apache-2.0
// accumulate_scores: add the attention weights of new queries to the scores of their KV head, in place.
// Definition: ../accumulate_scores.h.
//
// In      weights [B, H * G, Q, S] of 4 types, query_weights [B, Q] f32, carry [B] f32; strides free
// In/out  scores [B, H, S] f32
// How     a thread owns a token of one row and walks through queries and heads, 32 weights (16 in fp64) ahead of its
//         adds; neighbours read neighbours
// Bytes   B H G Q S size + 8 B H S (4 B H S with overwrite)
// Floor   bytes / copy bandwidth: 268 MB, 62 us at 4.3 TB/s for B = 1, H = 8, G = 4, Q = 512, S = 4096 f32
// Flight  32768 threads of 32 weights in that shape: 4.2 MB, where 3.5 keep 4.3 TB/s busy for 0.8 us of latency
// Launch  128 threads, one block per 128 tokens of a row, all on grid.x. At most 64 registers, no shared
//         memory: 8 blocks or more per SM, 50 % occupancy or more
// Order   as prescribed, so bitwise equal to CPU and reference: every step rounded to fp32, nothing fused
// Limits  2^31 - 1 blocks: else cudaErrorInvalidValue. Elements at multiples of their size: else
//         cudaErrorMisalignedAddress. Queries are not split, so few rows of few tokens with
//         many queries leave multiprocessors idle
// Tested  tests/cuda, on the CPU thread by thread (docs/cuda_without_gpu.md); compiled for every architecture. Not
//         timed on a device yet; to be timed by benchmarks/cuda/bench_accumulate_scores.cpp
#include "accumulate_scores.cuh"
#include "launch.h"

namespace fsdc::cuda {

cudaError_t launch_accumulate_scores(const AccumulateScoresParams& params, cudaStream_t stream) {
  return launch_accumulate_scores_kernel<kAccumulateScoresThreads>(params, stream);
}

}  // namespace fsdc::cuda
