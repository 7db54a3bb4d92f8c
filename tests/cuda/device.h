// SPDX-License-Identifier: Apache-2.0
// The device that these tests run on: the CPU by way of tests/simt (device_simt.h), or a GPU (device_cuda.cpp).
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/accumulate_scores.h"
#include "kernels/chunk_attention.h"
#include "kernels/cuda/chunk_attention/plan.h"
#include "kernels/cuda/decode_attention/plan.h"
#include "kernels/cuda/truncate/plan.h"
#include "kernels/truncate.h"

namespace fsdc::test {

using Bytes = std::vector<char>;

// A copy of `bytes` on the device, in an allocation of exactly this size.
class DeviceMemory {
 public:
  explicit DeviceMemory(const Bytes& bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  char* data() const { return data_; }
  Bytes copy() const;  // after all that was launched

 private:
  char* data_;
  size_t bytes_;
};

// In how many orders threads can be made to run, and the choice of one. A GPU has its own. Where blocks are smaller than
// they ship, so that they run quickly, the last of all_orders() makes them as they ship.
int orders();
int all_orders();
void use_order(int order);

// False where checks make kernels slow: then not every case runs in every way.
bool is_fast();

// Blocks that this device lets read each other's memory, at most: 1 or 8.
uint32_t most_in_cluster();

// Makes it fewer, up to the next use_order; false where that is not to be had.
bool limit_clusters(uint32_t blocks);

// Tokens that a block goes through in one round of its loops; in two or more of those that take smaller steps.
int64_t tokens_per_round();

// These throw where a launch failed.
void truncate(const TruncateParams& params, const cuda::TruncatePlan& plan);
void accumulate_scores(const AccumulateScoresParams& params);
void decode_attention(const DecodeAttentionParams& params, const cuda::DecodePlan& plan);

// That for this device, and the same for any other.
cuda::DecodePlan decode_plan(const DecodeAttentionParams& params);
cuda::DecodePlan decode_plan(const DecodeAttentionParams& params, const cuda::Device& device);
void chunk_attention(const ChunkAttentionParams& params, const cuda::ChunkLimits& limits);

}  // namespace fsdc::test
