// SPDX-License-Identifier: Apache-2.0
// truncate: keep the `kept` best-scored tokens of each row, in ascending token order.
// Definition: kernels/truncate.h.
//
// In      scores [B, H, S] f32, keys [B, H, S, Dk], values [B, H, S, Dv]; rows contiguous, strides free
// Out     keys [B, H, E, Dk], values [B, H, E, Dv], indices [B, H, E] i64, contiguous; E = kept + has_skipped
// How     a radix threshold over the bits of the scores (threshold.cuh), an ordered compaction (select.cuh), one copy of
//         keys and values in accesses of up to 16 bytes, cut by output rank, since kept tokens crowd among the recent
//         ones (gather.cuh); with an entry of the skipped tokens their sum (skipped.cuh). Attention weights are summed
//         as they come in, without a tensor of scores, wherever the codes of a row fit on chip; of longer rows
//         accumulate_scores sums them in a launch of its own
// Paths   few rows, sm_90 on: a cluster of 2 to 8 blocks per row, no more than the driver finds room for, each some of
//         its tokens; histograms, counts and partial sums go through each other's shared memory. Many rows: one block
//         per row. Where that leaves multiprocessors idle (8 rows or less; before sm_90, which has no clusters, more):
//         several clusters or blocks per row, each of which selects for itself and copies its part. With weights always
//         one. Six kernels: with and without a skipped entry, codes streamed, on chip, or made of weights
// Bytes   per row 4 S + 2 kept (Dk + Dv) size + 8 E, and (S - kept) (Dk + Dv) size for the skipped entry; instead of
//         4 S the weights, G Q S size. Each cluster of a row reads all its scores: once, 16 bytes at a time, where a
//         block's tokens fit into shared memory (on sm_90 50 thousand, 400 thousand per cluster), else 2 to 6 times, from
//         L2 as far as they fit there: up to 3 passes for the threshold, 4 where it is not above 0, one more in a cluster
//         to count what lies before, one for the indices. A skipped entry reads them again for each step of columns
//         (skipped.cuh). What is copied is stored past the caches: it is read again a layer's weights later
// Floor   bytes / copy bandwidth: 9.5 MB, 2.2 us at 4.3 TB/s for 8 rows, S = 32768, kept = 1024, D = 128 bf16
// Launch  one (two with weights of rows that do not fit on chip), no scratch, no host synchronisation: 512 threads, 1 to
//         8 blocks per row and cluster, up to as many blocks as multiprocessors where rows are few. Shared memory 17 KB,
//         with a skipped entry 25 KB, and 4 bytes per token on chip. At most 64 registers: 2 blocks per SM while both
//         fit its shared memory, occupancy 50 % (sm_80, 90, 100) or 67 % (sm_86, 89, 120); with a skipped entry or
//         weights at most 128: 1 block per SM, 25 or 33 %. tests/python/test_registers.py holds the compiler to it
// Waits   barriers of a block alone: 1 for the codes, 3 for the first digit, 4 for each of up to 2 more, 1 per round of
//         512 times 8 tokens, 1 at the end: 13 and a round's. In a cluster 2 per digit, 1 for the counts and 1 at the end,
//         8 in all, are the cluster's. A threshold that is not above 0 takes one digit more; columns of a skipped entry
//         2 each step
// Order   bitwise deterministic: counts are integers, each rank has one writer, the sum has a fixed order and segments
//         that no two blocks share; accumulated in fp32, fp64 for fp64
// Limits  S < 2^31, D below 2 GiB, 2^31 - 1 blocks: else cudaErrorInvalidValue. Elements at multiples of their size:
//         else cudaErrorMisalignedAddress
// Tested  tests/cuda, on the CPU thread by thread (docs/cuda_without_gpu.md), every path and cluster size; compiled for
//         every architecture. Not timed on a device yet: the limits in plan.h and the number of loads ahead wait for
//         that. To be timed by benchmarks/cuda/bench_truncate.cpp and benchmarks/python/bench_cuda.py
#include "kernels/cuda/launch.h"
#include "truncate.cuh"

namespace fsdc::cuda {

cudaError_t launch_truncate(const TruncateParams& params, const TruncatePlan& plan, cudaStream_t stream) {
  return launch_truncate_kernel<kTruncateThreads>(params, plan, stream);
}

cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream) {
  Device device{};
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  return launch_truncate(params, plan_truncate(params, device), stream);
}

bool truncate_sums_weights(const TruncateParams& params) {
  Device device{};
  return current_device(device) == cudaSuccess && can_sum_weights(plan_truncate(params, device));
}

}  // namespace fsdc::cuda
