// SPDX-License-Identifier: Apache-2.0
// Matrix products, which kernels leave to whoever launches them: LibTorch's cuBLAS in the operators, loops in tests.
#pragma once

#include "../types.h"

namespace fsdc::cuda {

// `count` matrices [rows, columns]; a transposed one has its strides exchanged.
struct Matrices {
  void* data;
  DType dtype;
  int64_t count;
  int64_t rows;
  int64_t columns;
  int64_t matrix_stride;
  int64_t row_stride;
  int64_t column_stride;
};

// All that is asked for is enqueued on the stream of the launches around it.
class Products {
 public:
  virtual ~Products() = default;

  // Memory of the device that lasts until the call of the operator has returned, aligned to 256 bytes.
  virtual void* memory(int64_t bytes) = 0;

  // product[i] = left[i] * right[i], summed in fp32 (fp64 for fp64). `left` and `right` are of one type, `product` of
  // its accumulator's.
  virtual void multiply(const Matrices& left, const Matrices& right, const Matrices& product) = 0;
};

}  // namespace fsdc::cuda
