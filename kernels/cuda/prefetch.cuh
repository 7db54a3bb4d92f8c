// SPDX-License-Identifier: Apache-2.0
// Asking for memory before it is wanted: what will be read soon comes into the L2 and takes no registers until then.
#pragma once

#include "platform.cuh"

namespace fsdc::cuda {

constexpr int kLineBytes = 128;

#if defined(__CUDACC__)
__device__ inline void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
#else
inline void prefetch_line(const void*) {}
#endif

}  // namespace fsdc::cuda
