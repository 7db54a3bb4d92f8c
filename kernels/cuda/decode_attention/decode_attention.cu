// SPDX-License-Identifier: Apache-2.0
// decode_attention: one new token for every row of a cache of fixed size.
// Definition: kernels/decode_attention.h.
//
// In      query [B, H * G, 1, D], new_keys [B, H, 1, D], new_values [B, H, 1, Dv], of 4 types; strides free
// In/out  keys [B, H, N + 1, D], values [B, H, N + 1, Dv], facts [4, B, H, N + 1] f32, positions [B, H, N + 1] i32, of
//         unequal heads [B, rows, ...]; seen [B] i32; the entry of the evicted, if there is one
// Out     output [B, H * G, 1, Dv], contiguous
// How     the tokens in use and the new one are cut into runs, a block each (plan.h). A block multiplies the keys of
//         its run with all G queries and with the new key in one read, keeps the logits on chip, and adds up its values
//         (attend.cuh). Once the softmax of all runs is known, they become output, scores and redundancy, and the new
//         token takes the slot of the one that goes (finish.cuh)
// Paths   a cluster of 1 to 8 blocks per row, its runs merged in each other's shared memory: one launch, no scratch.
//         Where a row must be cut and there are no clusters (before sm_90), and for heads with slots of their own, two
//         launches: a block for each run leaves it in scratch, then a block for each row merges them. The end of a
//         launch is the barrier, so nothing must be zero before and nothing is left behind: graphs and streams may mix
// Bytes   per row T (D + Dv) size, read once up to G = 8, once more for the values of each 8 heads beyond; 24 to 28 of
//         facts and positions for each slot. In two launches 4 (G + 1) more per slot, written and read, mostly in L2
// Floor   bytes / bandwidth: 4.4 MB, 1.3 us at 3.35 TB/s for B = 1, H = 8, T = 1024, D = 128 bf16
// FLOPs   no tensor cores: 2 (2 G + 1) D per slot, at G = 4, D = 128 in bf16 4.3 per byte. At 3.35 TB/s that is 14
//         TFLOP/s, a fifth of what an H100 has in fp32; with conversions, shuffles and loads of queries 101
//         instructions of a warp for each slot, two thirds of what it can issue. At G = 8 they are 160, and three
//         quarters of its bandwidth are used. docs/performance.md
// Launch  256 threads, two blocks or so for every multiprocessor, at most 128 registers: 2 blocks per SM, occupancy
//         25 % (sm_80, 90, 100) or 33 % (sm_86, 89, 120), with up to 64 KB of keys in flight. Shared memory 4 (G + 1)
//         bytes per token of the run and 8 to 20 KB. No host synchronisation. tests/python/test_registers.py holds the
//         compiler to it
// Order   by shapes and the device only: the same bits on every run. fp32, fp64 for fp64; not those of the CPU, but
//         eviction scores are rounded as there, so equal numbers are equal there too
// Limits  length, the tokens seen, < 2^position_bits(), 2^29 at H = 8 (finish.cuh); a graph, which says N for it, must
//         end before. (G + 1) D numbers in shared memory; 2^31 - 1 blocks: else cudaErrorInvalidValue. Elements at
//         multiples of their size: else cudaErrorMisalignedAddress. Where keys or values are not at multiples of 16
//         bytes, and in fp64, they are read element by element
// Tested  tests/cuda, on the CPU thread by thread (docs/cuda_without_gpu.md), every path and cluster size; compiled for
//         every architecture. Not timed on a device yet; to be timed by benchmarks/cuda/bench_decode_attention.cpp
#include "decode_attention.cuh"
#include "kernels/cuda/launch.h"

namespace fsdc::cuda {

cudaError_t plan_decode_attention(const DecodeAttentionParams& params, DecodePlan& plan) {
  Device device{};
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  plan = plan_decode_attention(params, device, kDecodeAttentionThreads);
  return cudaSuccess;
}

cudaError_t launch_decode_attention(const DecodeAttentionParams& params, const DecodePlan& plan, void* scratch,
                                    cudaStream_t stream) {
  return launch_decode_attention_kernel<kDecodeAttentionThreads>(params, plan, scratch, stream);
}

}  // namespace fsdc::cuda
