// SPDX-License-Identifier: Apache-2.0
// The one header every kernel includes: under nvcc the CUDA toolkit, under a plain C++ compiler the SIMT
// runtime of the tests ("simt.h", found by include path), which runs the same kernel source thread by thread
// on the CPU.
//
// So that both can read a kernel: launch() instead of <<<>>>, FSDC_SHARED instead of __shared__, FSDC_UNROLL
// instead of the pragma, no inline asm, no cooperative_groups, no CUB.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fsdc::cuda {
template <class T>
using SharedType = T;  // lets the macro declare arrays: FSDC_SHARED(sums, float[32])
}

#define FSDC_UNROLL _Pragma("unroll")
#define FSDC_SHARED(name, ...) __shared__::fsdc::cuda::SharedType<__VA_ARGS__> name
#define FSDC_DYNAMIC_SHARED(name, T)                                    \
  extern __shared__ __align__(128) unsigned char fsdc_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fsdc_dynamic_shared)

namespace fsdc::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace fsdc::cuda

#else

#include "simt.h"

#define FSDC_UNROLL
// One heap block of exact size per variable and thread block; the address of `key` names the variable.
#define FSDC_SHARED(name, ...)                                   \
  auto& name = ::simt::shared<__VA_ARGS__>([]() -> const void* { \
    static char key;                                             \
    return &key;                                                 \
  }())
#define FSDC_DYNAMIC_SHARED(name, T) T* name = static_cast<T*>(::simt::dynamic_shared())

namespace fsdc::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  ::simt::launch(kernel, {.blocks = grid, .threads = block, .dynamic_shared_bytes = shared_bytes}, arguments...);
  return cudaSuccess;
}

}  // namespace fsdc::cuda

#endif
