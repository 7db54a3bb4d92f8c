// SPDX-License-Identifier: Apache-2.0
// The loops of decode_attention for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/attention_includes.h"
#include "kernels/cpu/decode_attention.h"

FSDC_BEGIN_AVX2

namespace fsdc::cpu::avx2 {

// In this order: each needs those before it.
#include "kernels/cpu/vectors_avx2.inc"
//
#include "kernels/cpu/vectors.inc"
//
#include "kernels/cpu/decode_attention.inc"

}  // namespace fsdc::cpu::avx2

FSDC_END_TARGET
#endif
