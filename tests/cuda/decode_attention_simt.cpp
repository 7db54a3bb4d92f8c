// SPDX-License-Identifier: Apache-2.0
#include "device_simt.h"
#include "kernels/cuda/decode_attention/decode_attention.cuh"

namespace fsdc::test {

void decode_attention(const DecodeAttentionParams& params, const cuda::DecodePlan& plan) {
  const DeviceMemory scratch(Bytes(static_cast<size_t>(cuda::scratch_bytes(params, plan)), kUndefined));
  check(with_threads<cuda::kDecodeAttentionThreads>([&](auto threads) {
    return cuda::launch_decode_attention_kernel<threads>(params, plan, scratch.data(), nullptr);
  }));
}

cuda::DecodePlan decode_plan(const DecodeAttentionParams& params) {
  return decode_plan(params, {4, 227 << 10, 228 << 10, most_in_cluster()});
}

cuda::DecodePlan decode_plan(const DecodeAttentionParams& params, const cuda::Device& device) {
  return with_threads<cuda::kDecodeAttentionThreads>(
      [&](auto threads) { return cuda::plan_decode_attention(params, device, threads); });
}

}  // namespace fsdc::test
