// SPDX-License-Identifier: Apache-2.0
// placeholder
#include "launch.h"
#include "truncate.cuh"

namespace fsdc::cuda {

cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream) {
  return launch_truncate_kernel<512>(params, stream);
}

}  // namespace fsdc::cuda
