// SPDX-License-Identifier: Apache-2.0
// The one header every kernel includes: under nvcc the CUDA toolkit, under a plain C++ compiler the SIMT
// runtime of the tests ("simt.h", found by include path), which runs the same kernel source thread by thread
// on the CPU.
//
// So that both can read a kernel: launch() instead of <<<>>>, FSDC_SHARED instead of __shared__, FSDC_UNROLL and
// FSDC_NO_UNROLL instead of the pragma, no inline asm, no cooperative_groups, no CUB.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fsdc::cuda {

// Blocks lie along x. `cluster` of them read each other's shared memory (cluster.cuh).
struct Grid {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes = 0;  // dynamic
  unsigned cluster = 1;
};

}  // namespace fsdc::cuda

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <set>
#include <utility>

namespace fsdc::cuda {
template <class T>
using SharedType = T;  // lets the macro declare arrays: FSDC_SHARED(sums, float[32])
}

#define FSDC_UNROLL _Pragma("unroll")
#define FSDC_NO_UNROLL _Pragma("unroll 1")
#define FSDC_SHARED(name, ...) __shared__::fsdc::cuda::SharedType<__VA_ARGS__> name
#define FSDC_DYNAMIC_SHARED(name, T)                                    \
  extern __shared__ __align__(128) unsigned char fsdc_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fsdc_dynamic_shared)

namespace fsdc::cuda {

// Beyond 48 KiB, static included, shared memory must be asked for, once per kernel and device. Always for all there is:
// were it for what one launch takes, another host thread could lower it between asking and launching. Each thread
// remembers what it asked for: that takes no lock, and to ask again costs as much as a launch.
template <class Kernel>
cudaError_t allow_all_shared_memory(Kernel* kernel) {
  thread_local std::set<std::pair<int, const void*>> allowed;
  int device = 0, bytes = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  const std::pair asked_for{device, reinterpret_cast<const void*>(kernel)};
  if (error == cudaSuccess && allowed.contains(asked_for)) return cudaSuccess;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (error == cudaSuccess) allowed.insert(asked_for);
  return error;
}

// `cluster` must live as long as what is returned.
inline cudaLaunchConfig_t launch_config(const Grid& grid, cudaStream_t stream, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (grid.shared_bytes > 0) {
    if (const cudaError_t error = allow_all_shared_memory(kernel); error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = launch_config(grid, stream, cluster);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// The most blocks that a cluster of this kernel may have: 8, 4, 2 or 1. The driver says how many such clusters run at
// the same time; none where a part of a GPU (MIG) has too few multiprocessors side by side. Asks from sm_90 on only.
template <class... Parameters>
cudaError_t largest_cluster(void (*kernel)(Parameters...), Grid grid, uint32_t& blocks) {
  blocks = 1;
  if (grid.shared_bytes > 0) {
    if (const cudaError_t error = allow_all_shared_memory(kernel); error != cudaSuccess) return error;
  }
  for (grid.cluster = 8; grid.cluster > 1; grid.cluster /= 2) {
    grid.blocks = grid.cluster;
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = launch_config(grid, nullptr, cluster);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaErrorInvalidClusterSize) {
      (void)cudaGetLastError();  // an answer, not an error that others should hear of
    } else if (error != cudaSuccess) {
      return error;
    } else if (clusters > 0) {
      blocks = grid.cluster;
      break;
    }
  }
  return cudaSuccess;
}

}  // namespace fsdc::cuda

#else

#include "simt.h"

#define FSDC_UNROLL
#define FSDC_NO_UNROLL
// One heap block of exact size per variable and thread block; the address of `key` names the variable.
#define FSDC_SHARED(name, ...)                                   \
  auto& name = ::simt::shared<__VA_ARGS__>([]() -> const void* { \
    static char key;                                             \
    return &key;                                                 \
  }())
#define FSDC_DYNAMIC_SHARED(name, T) T* name = static_cast<T*>(::simt::dynamic_shared())

namespace fsdc::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t, const Arguments&... arguments) {
  ::simt::launch(kernel,
                 {.blocks = dim3(grid.blocks),
                  .threads = dim3(grid.threads),
                  .dynamic_shared_bytes = grid.shared_bytes,
                  .cluster = grid.cluster},
                 arguments...);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t largest_cluster(void (*)(Parameters...), Grid, uint32_t& blocks) {
  blocks = ::simt::options().largest_cluster;
  return cudaSuccess;
}

}  // namespace fsdc::cuda

#endif
