// SPDX-License-Identifier: Apache-2.0
#include <map>

#include "device.h"
#include "platform.cuh"

namespace fsdc::cuda {
namespace {

// Stands for all kernels: compiled for the same devices, and with all shared memory it has a multiprocessor for itself,
// as the largest of them have.
__global__ void probe_kernel() {}

cudaError_t ask(int number, Device& device) {
  cudaError_t error = cudaSuccess;
  const auto value_of = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, number);
    return value;
  };
  device.multiprocessors = value_of(cudaDevAttrMultiProcessorCount);
  device.shared_bytes_per_block = value_of(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_bytes_per_multiprocessor = value_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  // A build for older devices runs on newer ones too, but its code knows no clusters.
  cudaFuncAttributes compiled{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, probe_kernel);
  device.largest_cluster = 1;
  if (error == cudaSuccess && compiled.ptxVersion >= 90 && value_of(cudaDevAttrClusterLaunch) != 0) {
    const Grid grid{.blocks = 1, .threads = 1, .shared_bytes = static_cast<size_t>(device.shared_bytes_per_block)};
    error = largest_cluster(probe_kernel, grid, device.largest_cluster);
  }
  return error;
}

}  // namespace

// Asked once per thread and device: the answers do not change, and to ask costs as much as a launch.
cudaError_t current_device(Device& device) {
  thread_local std::map<int, Device> known;
  int number = 0;
  if (const cudaError_t error = cudaGetDevice(&number); error != cudaSuccess) return error;
  auto found = known.find(number);
  if (found == known.end()) {
    Device asked{};
    if (const cudaError_t error = ask(number, asked); error != cudaSuccess) return error;
    found = known.emplace(number, asked).first;
  }
  device = found->second;
  return cudaSuccess;
}

}  // namespace fsdc::cuda
