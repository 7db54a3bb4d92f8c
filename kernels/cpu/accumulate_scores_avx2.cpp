// SPDX-License-Identifier: Apache-2.0
// The loop of accumulate_scores for x86-64 with AVX2.
#if defined(__x86_64__)
#include "kernels/cpu/accumulate_scores.h"
#include "kernels/cpu/loops_includes.h"

FSDC_BEGIN_AVX2

namespace fsdc::cpu::avx2 {

#include "kernels/cpu/accumulate_scores.inc"

}  // namespace fsdc::cpu::avx2

FSDC_END_TARGET
#endif
