// SPDX-License-Identifier: Apache-2.0
// The products that CUDA kernels leave to LibTorch, here on the CPU, which knows them without another type for the sums.
#include <ATen/ATen.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include "csrc/products.h"

using namespace fsdc;

namespace {

cuda::Matrices matrices_of(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(),
          tensor.scalar_type() == at::kDouble ? DType::kFloat64 : DType::kFloat32,
          tensor.size(0),
          tensor.size(1),
          tensor.size(2),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2)};
}

}  // namespace

TEST_CASE("products of matrices as they lie") {
  const at::ScalarType type = GENERATE(at::kFloat, at::kDouble);
  const auto randn = [&](at::IntArrayRef sizes) { return at::randn(sizes, at::TensorOptions(type)); };
  const at::Tensor left = randn({3, 5, 16}).slice(2, 0, 7), keys = randn({4, 3, 7}).transpose(0, 1).mT();  // [3, 7, 4]
  const at::Tensor room = at::full({3, 5, 8}, 9.0, at::TensorOptions(type)), out = room.slice(2, 0, 4);
  TorchProducts products(torch::stable::Device(torch::headeronly::DeviceType::CPU));
  products.multiply(matrices_of(left), matrices_of(keys), matrices_of(out));
  CHECK(out.allclose(left.matmul(keys), 1e-5, 1e-6));
  CHECK(room.slice(2, 4).eq(9.0).all().item<bool>());
  // One matrix for all, and no rows to add up.
  products.multiply(matrices_of(left), matrices_of(keys.slice(0, 0, 1).expand({3, 7, 4})), matrices_of(out));
  CHECK(out.allclose(left.matmul(keys[0]), 1e-5, 1e-6));
  products.multiply(matrices_of(left.slice(2, 0, 0)), matrices_of(keys.slice(1, 0, 0)), matrices_of(out));
  CHECK(out.eq(0.0).all().item<bool>());
}

TEST_CASE("memory of products is of its own") {
  TorchProducts products(torch::stable::Device(torch::headeronly::DeviceType::CPU));
  char* const one = static_cast<char*>(products.memory(100));
  char* const other = static_cast<char*>(products.memory(100));
  std::fill_n(one, 100, char(1));
  std::fill_n(other, 100, char(2));
  CHECK(std::all_of(one, one + 100, [](char byte) { return byte == 1; }));
  products.memory(0);
}
