// SPDX-License-Identifier: Apache-2.0
// A GPU, and the kernels as they ship.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"
#include "kernels/cuda/launch.h"

namespace fsdc::test {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

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

}  // namespace fsdc::test
