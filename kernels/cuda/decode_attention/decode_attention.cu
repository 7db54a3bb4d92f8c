// SPDX-License-Identifier: Apache-2.0
#include "decode_attention.cuh"
#include "kernels/cuda/launch.h"

namespace fsdc::cuda {

cudaError_t launch_decode_attention(const DecodeAttentionParams& params, const DecodePlan& plan, void* scratch,
                                    cudaStream_t stream) {
  return launch_decode_attention_kernel<kDecodeAttentionThreads>(params, plan, scratch, stream);
}

cudaError_t plan_decode_attention(const DecodeAttentionParams& params, DecodePlan& plan) {
  Device device{};
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  plan = plan_decode_attention(params, device, kDecodeAttentionThreads);
  return cudaSuccess;
}

}  // namespace fsdc::cuda
