// SPDX-License-Identifier: Apache-2.0
// A GPU, and the kernels as they ship.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <list>
#include <stdexcept>
#include <string>

#include "device.h"
#include "host_products.h"
#include "kernels/cuda/launch.h"

namespace fsdc::test {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Matrices of the device, seen from the host: products are not what is tested here.
class Copy {
 public:
  explicit Copy(const cuda::Matrices& matrices) : on_device_(matrices.data), on_host_(matrices) {
    const int64_t last = offset_of(matrices, matrices.count - 1, matrices.rows - 1, matrices.columns - 1);
    if (matrices.count * matrices.rows * matrices.columns == 0) return;
    bytes_.resize(size_t(last + element_size(matrices.dtype)));
    check(cudaMemcpy(bytes_.data(), on_device_, bytes_.size(), cudaMemcpyDeviceToHost));
    on_host_.data = bytes_.data();
  }
  const cuda::Matrices& on_host() const { return on_host_; }
  void put_back() const { check(cudaMemcpy(on_device_, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice)); }

 private:
  void* on_device_;
  cuda::Matrices on_host_;
  Bytes bytes_;
};

class CopiedProducts final : public cuda::Products {
 public:
  void* memory(int64_t bytes) override { return memory_.emplace_back(Bytes(size_t(bytes), char(0xa5))).data(); }
  void multiply(const cuda::Matrices& left, const cuda::Matrices& right, const cuda::Matrices& product) override {
    const Copy one(left), other(right), out(product);
    multiply_on_host(one.on_host(), other.on_host(), out.on_host());
    out.put_back();
  }

 private:
  std::list<DeviceMemory> memory_;
};

}  // namespace

DeviceMemory::DeviceMemory(const Bytes& bytes) : data_(nullptr), bytes_(bytes.size()) {
  if (bytes_ == 0) return;
  void* data = nullptr;
  check(cudaMalloc(&data, bytes_));
  data_ = static_cast<char*>(data);
  check(cudaMemcpy(data_, bytes.data(), bytes_, cudaMemcpyHostToDevice));
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

Bytes DeviceMemory::copy() const {
  Bytes bytes(bytes_);
  if (bytes_ > 0) check(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost));
  return bytes;
}

int orders() { return 1; }
int all_orders() { return 1; }
void use_order(int) {}
bool is_fast() { return true; }

uint32_t most_in_cluster() {
  cuda::Device device{};
  check(cuda::current_device(device));
  return std::min(device.largest_cluster, 8u);
}

bool limit_clusters(uint32_t) { return false; }

int64_t tokens_per_round() { return 512 * 8; }

void truncate(const TruncateParams& params, const cuda::TruncatePlan& plan) {
  check(cuda::launch_truncate(params, plan, nullptr));
  check(cudaDeviceSynchronize());
}

void accumulate_scores(const AccumulateScoresParams& params) {
  check(cuda::launch_accumulate_scores(params, nullptr));
  check(cudaDeviceSynchronize());
}

void decode_attention(const DecodeAttentionParams& params, const cuda::DecodePlan& plan) {
  const DeviceMemory scratch(Bytes(static_cast<size_t>(cuda::scratch_bytes(params, plan)), char(0xa5)));
  check(cuda::launch_decode_attention(params, plan, scratch.data(), nullptr));
  check(cudaDeviceSynchronize());
}

cuda::DecodePlan decode_plan(const DecodeAttentionParams& params) {
  cuda::DecodePlan plan;
  check(cuda::plan_decode_attention(params, plan));
  return plan;
}

cuda::DecodePlan decode_plan(const DecodeAttentionParams& params, const cuda::Device& device) {
  return cuda::plan_decode_attention(params, device, 256);
}

void chunk_attention(const ChunkAttentionParams& params, const cuda::ChunkLimits& limits) {
  CopiedProducts products;
  check(cuda::launch_chunk_attention(params, limits, products, nullptr));
  check(cudaDeviceSynchronize());
}

}  // namespace fsdc::test
