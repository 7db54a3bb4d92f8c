// SPDX-License-Identifier: Apache-2.0
// The loops of chunk_attention for any processor.
#include "kernels/cpu/attention_includes.h"
#include "kernels/cpu/chunk_attention.h"

namespace fsdc::cpu::portable {

namespace {
#include "kernels/cpu/vectors_portable.inc"
}  // namespace
#include "kernels/cpu/chunk_attention.inc"

extern const ChunkAttentionLoops kChunkAttentionLoops;
const ChunkAttentionLoops kChunkAttentionLoops = {attend, add_votes, compare};

}  // namespace fsdc::cpu::portable
