// SPDX-License-Identifier: Apache-2.0
// truncate: keep the `kept` best-scored tokens of each row, in ascending token order.
// Definition: ../truncate.h.
//
// In      scores [B, H, S] f32, keys [B, H, S, Dk], values [B, H, S, Dv]; rows contiguous, strides free
// Out     keys [B, H, E, Dk], values [B, H, E, Dv], indices [B, H, E] i64, contiguous; E = kept + has_skipped
// How     a radix threshold over the bits of the scores, an ordered compaction, a copy (truncate_select.cuh,
//         truncate_gather.cuh); with an entry of the skipped tokens their sum (truncate_skipped.cuh)
// Bytes   per row 4 S + 2 kept (Dk + Dv) size + 8 E, and (S - kept) (Dk + Dv) size for the skipped entry; the
//         scores are read 2 to 4 times, at most once from memory while they fit L1 and L2
// Floor   bytes / copy bandwidth: 9.5 MB, 2.2 us at 4.3 TB/s for 8 rows, S = 32768, kept = 1024, D = 128 bf16
// Launch  one, no scratch, no host synchronisation: 512 threads, one block per row, more where rows are fewer
//         than 128. Without skipped entry 64 registers, 8.4 KB shared memory: 2 blocks per SM, occupancy 50 %
//         (sm_80, 90, 100) or 67 % (sm_86, 89, 120), 64 KB of loads in flight. With it at most 126 registers,
//         18.7 KB: 1 block per SM, occupancy 25 or 33 %, 32 KB in flight
// Order   bitwise deterministic: counts are integers, each rank has one writer, the sum has a fixed order;
//         accumulated in fp32, fp64 for fp64
// Limits  S < 2^32, D below 2 GiB, 2^31 - 1 blocks: else cudaErrorInvalidValue
// Tested  compiled for every architecture, not yet run or timed on a GPU: kBlocks,
//         kShareBytes and the number of loads ahead wait for that
#include "launch.h"
#include "truncate.cuh"

namespace fsdc::cuda {

cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream) {
  return launch_truncate_kernel<512>(params, stream);
}

}  // namespace fsdc::cuda
