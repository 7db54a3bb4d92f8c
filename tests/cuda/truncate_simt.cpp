// SPDX-License-Identifier: Apache-2.0
#include "device_simt.h"
#include "kernels/cuda/truncate/truncate.cuh"

namespace fsdc::test {

uint32_t most_in_cluster() {
  uint32_t blocks = 0;
  check(cuda::largest_cluster(cuda::truncate_kernel<true, cuda::CodeSource::kScoresOnChip, kThreads>, {}, blocks));
  return blocks;
}

int64_t tokens_per_round() {
  constexpr int kItems = 8;
  static_assert(kItems % cuda::CodesOnChip::kItems == 0 && kItems % cuda::StreamedCodes::kItems == 0 &&
                kItems % cuda::kTokensPerThread == 0);
  return with_threads<cuda::kTruncateThreads>([](auto threads) { return threads * kItems; });
}

void truncate(const TruncateParams& params, const cuda::TruncatePlan& plan) {
  check(with_threads<cuda::kTruncateThreads>(
      [&](auto threads) { return cuda::launch_truncate_kernel<threads>(params, plan, nullptr); }));
}

}  // namespace fsdc::test
