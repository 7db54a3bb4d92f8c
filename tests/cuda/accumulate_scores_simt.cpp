// SPDX-License-Identifier: Apache-2.0
#include "device_simt.h"
#include "kernels/cuda/accumulate_scores.cuh"

namespace fsdc::test {

void accumulate_scores(const AccumulateScoresParams& params) {
  check(with_threads<cuda::kAccumulateScoresThreads>(
      [&](auto threads) { return cuda::launch_accumulate_scores_kernel<threads>(params, nullptr); }));
}

}  // namespace fsdc::test
