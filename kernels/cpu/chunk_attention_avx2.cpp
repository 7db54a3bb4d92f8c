// SPDX-License-Identifier: Apache-2.0
// The loops of chunk_attention for x86-64 with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/attention_includes.h"
#include "kernels/cpu/chunk_attention.h"

FSDC_BEGIN_AVX2

namespace fsdc::cpu::avx2 {

namespace {
#include "kernels/cpu/vectors_avx2.inc"
}  // namespace
#include "kernels/cpu/chunk_attention.inc"

extern const ChunkAttentionLoops kChunkAttentionLoops;
const ChunkAttentionLoops kChunkAttentionLoops = {attend, add_votes, compare};

}  // namespace fsdc::cpu::avx2

FSDC_END_TARGET
#endif
