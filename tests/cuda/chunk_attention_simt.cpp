// SPDX-License-Identifier: Apache-2.0
#include <list>

#include "device_simt.h"
#include "host_products.h"
#include "kernels/cuda/chunk_attention/chunk_attention.cuh"

namespace fsdc::test {
namespace {

class HostProducts final : public cuda::Products {
 public:
  void* memory(int64_t bytes) override { return memory_.emplace_back(Bytes(size_t(bytes), kUndefined)).data(); }
  void multiply(const cuda::Matrices& left, const cuda::Matrices& right, const cuda::Matrices& product) override {
    multiply_on_host(left, right, product);
  }

 private:
  std::list<DeviceMemory> memory_;
};

}  // namespace

void chunk_attention(const ChunkAttentionParams& params, const cuda::ChunkLimits& limits) {
  HostProducts products;
  check(with_threads<cuda::kChunkThreads>(
      [&](auto threads) { return cuda::run_chunk_attention<threads>(params, limits, products, nullptr); }));
}

}  // namespace fsdc::test
