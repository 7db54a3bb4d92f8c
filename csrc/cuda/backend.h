// SPDX-License-Identifier: Apache-2.0
// A CUDA device: kernels/cuda on LibTorch's current stream, with the tensor's device made current.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/checks.h"
#include "csrc/products.h"
#include "kernels/cuda/launch.h"

namespace fsdc {

class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& tensor) : device_(tensor.device()), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  bool truncate_sums_weights(const TruncateParams& params) const { return cuda::truncate_sums_weights(params); }
  void truncate(const TruncateParams& params) const { check("truncate", cuda::launch_truncate(params, stream_)); }
  void accumulate_scores(const AccumulateScoresParams& params) const {
    check("accumulate_scores_", cuda::launch_accumulate_scores(params, stream_));
  }
  void decode_attention(const DecodeAttentionParams& params) const {
    const uint32_t bits = cuda::position_bits(params);
    FSDC_CHECK(params.length >> bits == 0, "decode_attention_: length must be below 2^", bits, " on CUDA with ",
               params.heads, " KV heads; got ", params.length);
    cuda::DecodePlan plan;
    check("decode_attention_", cuda::plan_decode_attention(params, plan));
    const int64_t bytes = cuda::scratch_bytes(params, plan);
    // Of torch's allocator, which gives it to nobody else before what is launched here has run: neither to another
    // stream nor, where a graph is captured, to one that may run beside it.
    const Tensor scratch =
        bytes > 0 ? torch::stable::empty(std::vector{bytes}, ScalarType::Byte, {}, device_) : Tensor();
    void* const memory = bytes > 0 ? scratch.mutable_data_ptr() : nullptr;
    check("decode_attention_", cuda::launch_decode_attention(params, plan, memory, stream_));
  }

  void chunk_attention(const ChunkAttentionParams& params) const {
    TorchProducts products(device_);
    check("chunk_attention_", cuda::launch_chunk_attention(params, products, stream_));
  }

 private:
  static void check(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // it is told here: whoever asks CUDA next must not hear it as his own
    throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(error));
  }

  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fsdc
