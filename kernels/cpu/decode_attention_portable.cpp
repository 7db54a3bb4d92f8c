// SPDX-License-Identifier: Apache-2.0
// The loops of decode_attention for any processor: SSE2 on x86-64, NEON on 64-bit Arm.
#include "kernels/cpu/attention_includes.h"
#include "kernels/cpu/decode_attention.h"

namespace fsdc::cpu::portable {

// In this order: each needs those before it.
#include "kernels/cpu/vectors_portable.inc"
//
#include "kernels/cpu/vectors.inc"
//
#include "kernels/cpu/decode_attention.inc"

}  // namespace fsdc::cpu::portable
