// SPDX-License-Identifier: Apache-2.0
// How the files that compile a kernel for the CPU launch it: one for each, so that a change of one compiles no other.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "kernels/cuda/platform.cuh"

namespace fsdc::test {

constexpr int kThreads = 64;             // of a block, few enough to run quickly
constexpr char kUndefined = char(0xa5);  // what memory holds at first, as shared memory does

bool has_shipped_blocks();  // as use_order() says

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed with error " + std::to_string(int(error)));
}

// launch(threads) with the threads of a block as a constant.
template <int kShippedThreads, class Launch>
auto with_threads(const Launch& launch) {
  return has_shipped_blocks() ? launch(std::integral_constant<int, kShippedThreads>())
                              : launch(std::integral_constant<int, kThreads>());
}

}  // namespace fsdc::test
