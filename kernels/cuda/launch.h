// SPDX-License-Identifier: Apache-2.0
// All that kernels/cuda offers: one launcher per operation. Each enqueues on `stream` and returns without waiting.
#pragma once

#include <cuda_runtime_api.h>

#include "../accumulate_scores.h"
#include "../truncate.h"

namespace fsdc::cuda {

cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream);

cudaError_t launch_accumulate_scores(const AccumulateScoresParams& params, cudaStream_t stream);

}  // namespace fsdc::cuda
