// SPDX-License-Identifier: Apache-2.0
// The matrix products that kernels leave to LibTorch: bmm on the current stream, of memory that LibTorch has given.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "csrc/checks.h"
#include "kernels/cuda/products.h"

namespace fsdc {

class TorchProducts final : public cuda::Products {
 public:
  explicit TorchProducts(torch::stable::Device device) : device_(device) {}

  void* memory(int64_t bytes) override {
    memory_.push_back(torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device_));
    return memory_.back().mutable_data_ptr();
  }

  // The overloads with `out`: autocast leaves them alone.
  void multiply(const cuda::Matrices& left, const cuda::Matrices& right, const cuda::Matrices& product) override {
    const Tensor one = tensor_of(left), other = tensor_of(right), out = tensor_of(product);
    using torch::stable::detail::from;
    if (left.dtype == product.dtype) {
      std::array<StableIValue, 3> stack{from(one), from(other), from(out)};
      call("out", stack.data());
    } else {
      std::array<StableIValue, 4> stack{from(one), from(other), from(out.scalar_type()), from(out)};
      call("dtype_out", stack.data());
    }
  }

 private:
  static void call(const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more, to be given back
  }

  static ScalarType type_of(DType dtype) {
    switch (dtype) {
      case DType::kFloat64:
        return ScalarType::Double;
      case DType::kFloat16:
        return ScalarType::Half;
      case DType::kBFloat16:
        return ScalarType::BFloat16;
      default:
        return ScalarType::Float;
    }
  }

  Tensor tensor_of(const cuda::Matrices& matrices) const {
    return torch::stable::from_blob(matrices.data, {matrices.count, matrices.rows, matrices.columns},
                                    {matrices.matrix_stride, matrices.row_stride, matrices.column_stride}, device_,
                                    type_of(matrices.dtype));
  }

  torch::stable::Device device_;
  std::vector<Tensor> memory_;
};

}  // namespace fsdc
