// SPDX-License-Identifier: Apache-2.0
// The running CUDA thread, and how it reports an error.
#pragma once

// Vector types, dim3, half and bfloat16, qualifiers; the latter mean nothing to a host compiler.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <source_location>

#undef __launch_bounds__
#define __launch_bounds__(...)

// Kernels say FSDC_SHARED instead (kernels/cuda/platform.cuh).
#undef __shared__
#define __shared__ simt_cannot_compile_raw_shared_memory

namespace simt {

// Where in a kernel something was called: the last parameter of all that can go wrong, with a default that callers
// leave alone.
using Site = std::source_location;

struct Thread {
  uint3 thread_index{};
  uint3 block_index{};
  dim3 block_size;
  dim3 grid_size;
  unsigned number = 0;  // within its block

  unsigned lane() const { return number % 32; }
  unsigned warp() const { return number / 32; }
};

inline const Thread* running = nullptr;  // null outside of kernels

// Ends the launch with an error that says what, where and in which thread; launch() throws it. The thread never runs
// on, so nothing may need its destructor. `format` as for printf; an empty site is left out.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace simt

#define threadIdx (::simt::running->thread_index)
#define blockIdx (::simt::running->block_index)
#define blockDim (::simt::running->block_size)
#define gridDim (::simt::running->grid_size)
