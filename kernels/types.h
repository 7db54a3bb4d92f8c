// SPDX-License-Identifier: Apache-2.0
// What CPU and CUDA kernels share: element types and the function qualifier. No torch, no CUDA headers.
//
// Letters, here and everywhere: B batch, H KV heads, G query heads per KV head, Q new queries, S tokens, D head
// dimension. A row is one (batch, KV head) pair. Strides are in elements.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FSDC_HOST_DEVICE __host__ __device__
#else
#define FSDC_HOST_DEVICE
#endif

namespace fsdc {

static_assert(__cplusplus >= 202002L, "fixed_size_kv_cache needs C++20: compile with -std=c++20");

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace fsdc
