// SPDX-License-Identifier: Apache-2.0
// What a GPU has, as far as launches are planned by it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fsdc::cuda {

struct Device {
  int64_t multiprocessors;
  int64_t shared_bytes_per_block;  // at most, when asked for
  int64_t shared_bytes_per_multiprocessor;
  uint32_t largest_cluster;  // of blocks that have a multiprocessor each; 1 where there are no clusters
};

// The current one.
cudaError_t current_device(Device& device);

}  // namespace fsdc::cuda
