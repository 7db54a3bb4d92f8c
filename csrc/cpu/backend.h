// SPDX-License-Identifier: Apache-2.0
// The CPU: kernels/cpu on LibTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "csrc/checks.h"
#include "kernels/cpu/cpu.h"

namespace fsdc {

class TorchThreads final : public cpu::Parallel {
 public:
  int64_t threads() const override { return torch::stable::get_num_threads(); }
  void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const override {
    torch::stable::parallel_for(0, n, grain, body);
  }
};

class CpuBackend {
 public:
  explicit CpuBackend(const Tensor&) {}

  bool truncate_sums_weights(const TruncateParams&) const { return false; }
  void truncate(const TruncateParams& params) const { cpu::truncate(params, TorchThreads()); }
  void decode_attention(const DecodeAttentionParams& params) const { cpu::decode_attention(params, TorchThreads()); }
  void accumulate_scores(const AccumulateScoresParams& params) const { cpu::accumulate_scores(params, TorchThreads()); }
  void chunk_attention(const ChunkAttentionParams& params) const { cpu::chunk_attention(params, TorchThreads()); }
};

}  // namespace fsdc
