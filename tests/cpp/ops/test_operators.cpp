// SPDX-License-Identifier: Apache-2.0
// The operators as a C++ user calls them, on the CPU and, where there is one, on a GPU.
#include <ATen/ATen.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>

#include "csrc/fsdc.h"

namespace {

at::Device any_device() {
  const auto device = GENERATE(at::kCPU, at::kCUDA);
  if (device == at::kCUDA && !at::hasCUDA()) SKIP("no CUDA device");
  return device;
}

}  // namespace

TEST_CASE("truncate keeps the best tokens in order") {
  const at::Device device = any_device();
  const at::Tensor scores = at::tensor({0.1f, 0.9f, 0.1f, 0.5f}, device).view({1, 1, 4});
  const at::Tensor keys = at::arange(8, at::TensorOptions(device).dtype(at::kFloat)).view({1, 1, 4, 2});
  const auto [out_keys, out_values, indices] = fsdc::truncate(keys, -keys, scores, 3);
  const at::Tensor expected = at::tensor({1, 2, 3}, at::TensorOptions(device).dtype(at::kLong));
  CHECK(indices.view(-1).equal(expected));
  CHECK(out_keys.equal(keys.index_select(2, expected)));
  CHECK(out_values.equal(-out_keys));
}

TEST_CASE("README's call") {  // its very lines: tests/python/test_documents.py compares
  const at::Tensor all_keys = at::zeros({1, 2, 2000, 4}), all_values = all_keys, scores = at::zeros({1, 2, 2000});
  auto [keys, values, indices] = fsdc::truncate(all_keys, all_values, scores, /*cache_size=*/1024);
  CHECK(keys.sizes() == values.sizes());
  CHECK(indices.sizes() == at::IntArrayRef{1, 2, 1024});
}

TEST_CASE("truncate sums the skipped tokens") {
  const at::Device device = any_device();
  const at::Tensor scores = at::arange(4, at::TensorOptions(device).dtype(at::kFloat)).view({1, 1, 4});
  const at::Tensor keys = at::arange(4, at::TensorOptions(device).dtype(at::kBFloat16)).view({1, 1, 4, 1});
  const auto [out_keys, out_values, indices] = fsdc::truncate(keys, keys, scores, 2, true);
  CHECK(indices.view(-1).cpu().equal(at::tensor({3, -1}, at::kLong)));
  CHECK(out_keys.view(-1).cpu().to(at::kFloat).equal(at::tensor({3.0f, 0.0f + 1.0f + 2.0f})));
}

TEST_CASE("accumulate_scores_ writes in place") {
  const at::Device device = any_device();
  at::Tensor scores = at::ones({1, 2, 3}, device);
  const at::Tensor weights = at::ones({1, 4, 5, 3}, device);
  fsdc::accumulate_scores_(scores, weights, std::nullopt, at::full({1}, 0.5, device));
  CHECK(scores.equal(at::full({1, 2, 3}, 0.5 + 2 * 5, device)));
}

TEST_CASE("chunk_attention_ attends and votes") {
  const at::Tensor keys = at::zeros({1, 1, 3, 4}), values = at::arange(3, at::kFloat).view({1, 1, 3, 1});
  const at::Tensor facts = at::zeros({4, 1, 1, 3});
  const at::Tensor query = at::ones({1, 2, 2, 4});  // sees two tokens, then three
  const at::Tensor output = fsdc::chunk_attention_(query, keys, values, 1.0, {.facts = facts});
  CHECK(at::allclose(output, at::tensor({0.5f, 1.0f}).view({1, 1, 2, 1}).expand({1, 2, 2, 1})));
  CHECK(at::allclose(facts[0].view(-1), at::tensor({5.0f / 3, 5.0f / 3, 2.0f / 3})));
}

TEST_CASE("a bad argument throws and says what came") {
  const at::Tensor keys = at::ones({1, 2, 3, 4});
  CHECK_THROWS_WITH(fsdc::truncate(keys, keys, at::ones({1, 2, 3}), 0),
                    "truncate: cache_size must be at least 1; got 0");
}
