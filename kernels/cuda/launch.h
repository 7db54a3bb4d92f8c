// SPDX-License-Identifier: Apache-2.0
// All that kernels/cuda offers: one launcher per operation. Each enqueues on `stream` and returns without waiting.
#pragma once

#include <cuda_runtime_api.h>

#include "../accumulate_scores.h"
#include "../chunk_attention.h"
#include "../decode_attention.h"
#include "../truncate.h"
#include "chunk_attention/plan.h"
#include "decode_attention/plan.h"
#include "device.h"
#include "products.h"
#include "truncate/plan.h"

namespace fsdc::cuda {

// With the plan for the current device, or one to try out. cudaErrorInvalidValue where there are weights instead of
// scores and the plan cannot sum them.
cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream);
cudaError_t launch_truncate(const TruncateParams& params, const TruncatePlan& plan, cudaStream_t stream);

// True where launch_truncate on the current device takes `params.weights` instead of scores.
bool truncate_sums_weights(const TruncateParams& params);

cudaError_t launch_accumulate_scores(const AccumulateScoresParams& params, cudaStream_t stream);

// The plan for the current device, and the launch with it or with one to try out. `scratch` is scratch_bytes() of device
// memory with any content, which is free again when the launch has run.
cudaError_t plan_decode_attention(const DecodeAttentionParams& params, DecodePlan& plan);
cudaError_t launch_decode_attention(const DecodeAttentionParams& params, const DecodePlan& plan, void* scratch,
                                    cudaStream_t stream);

// In blocks of the usual size, or of one to try out. `params.head_layout` is read here and now, so it is the host's; all
// else is the device's.
cudaError_t launch_chunk_attention(const ChunkAttentionParams& params, Products& products, cudaStream_t stream);
cudaError_t launch_chunk_attention(const ChunkAttentionParams& params, const ChunkLimits& limits, Products& products,
                                   cudaStream_t stream);

}  // namespace fsdc::cuda
