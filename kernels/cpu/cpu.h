// SPDX-License-Identifier: Apache-2.0
// All that kernels/cpu offers: one function per operation. Each returns when the work is done. `isa` must be one of
// available_isas().
#pragma once

#include <string>

#include "kernels/accumulate_scores.h"
#include "kernels/chunk_attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/parallel.h"
#include "kernels/decode_attention.h"
#include "kernels/truncate.h"

namespace fsdc::cpu {

void truncate(const TruncateParams& params, const Parallel& parallel, Isa isa = active_isa());

void accumulate_scores(const AccumulateScoresParams& params, const Parallel& parallel, Isa isa = active_isa());

void chunk_attention(const ChunkAttentionParams& params, const Parallel& parallel, Isa isa = active_isa());
void decode_attention(const DecodeAttentionParams& params, const Parallel& parallel, Isa isa = active_isa());

// The instruction set that an operator's loops are compiled for where `isa` is active; throws std::out_of_range for other
// names.
Isa isa_of(const std::string& operation, Isa isa = active_isa());

}  // namespace fsdc::cpu
