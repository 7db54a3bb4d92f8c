// SPDX-License-Identifier: Apache-2.0
// The loop of accumulate_scores for x86-64 with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "kernels/cpu/accumulate_scores.h"
#include "kernels/cpu/loops_includes.h"

FSDC_BEGIN_AVX512

namespace fsdc::cpu::avx512 {

#include "kernels/cpu/accumulate_scores.inc"

}  // namespace fsdc::cpu::avx512

FSDC_END_TARGET
#endif
