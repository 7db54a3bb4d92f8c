// SPDX-License-Identifier: Apache-2.0
// The kernels themselves, compiled for the CPU, with blocks small enough to run quickly, and as they ship.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <stdexcept>

#include "device.h"
#include "host_products.h"
#include "kernels/cuda/accumulate_scores.cuh"
#include "kernels/cuda/chunk_attention/chunk_attention.cuh"
#include "kernels/cuda/decode_attention/decode_attention.cuh"
#include "kernels/cuda/truncate/truncate.cuh"

namespace fsdc::test {
namespace {

constexpr int kThreads = 64;
bool shipped_blocks = false;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed with error " + std::to_string(int(error)));
}

class HostProducts final : public cuda::Products {
 public:
  void* memory(int64_t bytes) override { return memory_.emplace_back(Bytes(size_t(bytes), kUndefined)).data(); }
  void multiply(const cuda::Matrices& left, const cuda::Matrices& right, const cuda::Matrices& product) override {
    multiply_on_host(left, right, product);
  }

 private:
  static constexpr char kUndefined = char(0xa5);  // as shared memory is
  std::list<DeviceMemory> memory_;
};

}  // namespace

// malloc: AddressSanitizer sees the first byte beyond.
DeviceMemory::DeviceMemory(const Bytes& bytes)
    : data_(static_cast<char*>(std::malloc(bytes.size()))), bytes_(bytes.size()) {
  if (bytes_ > 0) std::memcpy(data_, bytes.data(), bytes_);
}
DeviceMemory::~DeviceMemory() { std::free(data_); }
Bytes DeviceMemory::copy() const { return {data_, data_ + bytes_}; }

bool is_fast() {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  return false;
#else
  return true;
#endif
}

// The race checker hardly minds in which order threads come, and each order costs as much again; blocks as they ship cost
// it minutes.
#if defined(__SANITIZE_THREAD__)
int orders() { return 1; }
int all_orders() { return 1; }
#else
int orders() { return 4; }
int all_orders() { return 5; }
#endif

void use_order(int order) {
  constexpr simt::Order kOrders[] = {simt::Order::kSequential, simt::Order::kReverse, simt::Order::kRandom,
                                     simt::Order::kRandom, simt::Order::kSequential};
  simt::options().order = kOrders[order];
  simt::options().seed = static_cast<uint64_t>(order);
  simt::options().resident_clusters = order < 2 || order == 4 ? 1 : 3;
  simt::options().largest_cluster = 8;
  shipped_blocks = order == 4;
}

uint32_t most_in_cluster() {
  uint32_t blocks = 0;
  check(cuda::largest_cluster(cuda::truncate_kernel<true, cuda::CodeSource::kScoresOnChip, kThreads>, {}, blocks));
  return blocks;
}

bool limit_clusters(uint32_t blocks) {
  simt::options().largest_cluster = blocks;
  return true;
}

int64_t tokens_per_round() {
  constexpr int kItems = 8;
  static_assert(kItems % cuda::CodesOnChip::kItems == 0 && kItems % cuda::StreamedCodes::kItems == 0 &&
                kItems % cuda::kTokensPerThread == 0);
  return (shipped_blocks ? cuda::kTruncateThreads : kThreads) * kItems;
}

void truncate(const TruncateParams& params, const cuda::TruncatePlan& plan) {
  check(shipped_blocks ? cuda::launch_truncate_kernel<cuda::kTruncateThreads>(params, plan, nullptr)
                       : cuda::launch_truncate_kernel<kThreads>(params, plan, nullptr));
}

void accumulate_scores(const AccumulateScoresParams& params) {
  check(shipped_blocks ? cuda::launch_accumulate_scores_kernel<cuda::kAccumulateScoresThreads>(params, nullptr)
                       : cuda::launch_accumulate_scores_kernel<kThreads>(params, nullptr));
}

void decode_attention(const DecodeAttentionParams& params, const cuda::DecodePlan& plan) {
  const DeviceMemory scratch(Bytes(static_cast<size_t>(cuda::scratch_bytes(params, plan)), char(0xa5)));
  check(shipped_blocks
            ? cuda::launch_decode_attention_kernel<cuda::kDecodeAttentionThreads>(params, plan, scratch.data(), nullptr)
            : cuda::launch_decode_attention_kernel<kThreads>(params, plan, scratch.data(), nullptr));
}

cuda::DecodePlan decode_plan(const DecodeAttentionParams& params) {
  return decode_plan(params, {4, 227 << 10, 228 << 10, most_in_cluster()});
}

cuda::DecodePlan decode_plan(const DecodeAttentionParams& params, const cuda::Device& device) {
  return cuda::plan_decode_attention(params, device, shipped_blocks ? cuda::kDecodeAttentionThreads : kThreads);
}

void chunk_attention(const ChunkAttentionParams& params, const cuda::ChunkLimits& limits) {
  HostProducts products;
  check(shipped_blocks ? cuda::run_chunk_attention<cuda::kChunkThreads>(params, limits, products, nullptr)
                       : cuda::run_chunk_attention<kThreads>(params, limits, products, nullptr));
}

}  // namespace fsdc::test
