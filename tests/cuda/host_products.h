// SPDX-License-Identifier: Apache-2.0
// Matrix products by loops over memory of the host, summed in double.
#pragma once

#include <cstring>
#include <vector>

#include "inputs.h"
#include "kernels/cuda/products.h"

namespace fsdc::test {

inline int64_t offset_of(const cuda::Matrices& in, int64_t matrix, int64_t row, int64_t column) {
  return (matrix * in.matrix_stride + row * in.row_stride + column * in.column_stride) * element_size(in.dtype);
}

inline double number_at(DType dtype, const char* at) {
  double number = 0;
  cpu::with_element_type(dtype, [&](auto element) {
    std::memcpy(&element, at, sizeof element);
    number = cpu::convert<cpu::Accumulator<decltype(element)>>(element);
  });
  return number;
}

inline void multiply_on_host(const cuda::Matrices& left, const cuda::Matrices& right, const cuda::Matrices& product) {
  REQUIRE(left.columns == right.rows);
  REQUIRE(left.rows == product.rows);
  REQUIRE(right.columns == product.columns);
  REQUIRE((left.dtype == right.dtype && left.count == right.count && left.count == product.count));
  const auto read = [](const cuda::Matrices& from, int64_t matrix, int64_t row, int64_t column) {
    return number_at(from.dtype, static_cast<const char*>(from.data) + offset_of(from, matrix, row, column));
  };
  for (int64_t i = 0; i < product.count; ++i) {
    for (int64_t row = 0; row < product.rows; ++row) {
      for (int64_t column = 0; column < product.columns; ++column) {
        double sum = 0;
        for (int64_t k = 0; k < left.columns; ++k) sum += read(left, i, row, k) * read(right, i, k, column);
        store(product.dtype, sum, static_cast<char*>(product.data) + offset_of(product, i, row, column));
      }
    }
  }
}

}  // namespace fsdc::test
