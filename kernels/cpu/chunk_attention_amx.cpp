// SPDX-License-Identifier: Apache-2.0
// The loops of chunk_attention for x86-64 with AMX: as for AVX-512, but bfloat16 is multiplied in tiles.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/attention_includes.h"
#include "kernels/cpu/chunk_attention.h"

FSDC_BEGIN_AMX

namespace fsdc::cpu::amx {

namespace {
#include "kernels/cpu/vectors_avx512.inc"
}  // namespace
#include "kernels/cpu/chunk_attention.inc"
//
#include "kernels/cpu/chunk_tiles.inc"

extern const ChunkAttentionLoops kChunkAttentionLoops;
const ChunkAttentionLoops kChunkAttentionLoops = {attend_with_tiles, add_votes, compare_with_tiles};

}  // namespace fsdc::cpu::amx

FSDC_END_TARGET
#endif
