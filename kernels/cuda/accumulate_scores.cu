// SPDX-License-Identifier: Apache-2.0
// placeholder
#include "accumulate_scores.cuh"
#include "launch.h"

namespace fsdc::cuda {

cudaError_t launch_accumulate_scores(const AccumulateScoresParams& params, cudaStream_t stream) {
  return launch_accumulate_scores_kernel<128>(params, stream);
}

}  // namespace fsdc::cuda
