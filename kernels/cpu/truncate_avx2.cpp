// SPDX-License-Identifier: Apache-2.0
// The loops of truncate for x86-64 with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/loops_includes.h"
#include "kernels/cpu/truncate.h"
#include "kernels/score_order.h"

FSDC_BEGIN_AVX2

namespace fsdc::cpu::avx2 {

namespace {

using Codes = uint32_t __attribute__((vector_size(32)));

// Bit i: codes[i] >= threshold.
inline uint32_t at_least(Codes codes, uint32_t threshold) {
  const __m256i code = reinterpret_cast<__m256i>(codes);
  const __m256i larger = _mm256_max_epu32(code, _mm256_set1_epi32(static_cast<int>(threshold)));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(larger, code))));
}

// Bit i: scores[i] is not less than `floor`; a NaN never is.
inline uint32_t not_less(const float* scores, float floor) {
  const __m256 comparison = _mm256_cmp_ps(_mm256_loadu_ps(scores), _mm256_set1_ps(floor), _CMP_NLT_UQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(comparison));
}

// Writes start + i for each set bit i of the mask, in order; returns the end of what it wrote.
inline uint32_t* append_set_bits(uint64_t mask, uint32_t start, uint32_t* out) {
  for (; mask != 0; mask &= mask - 1) *out++ = start + static_cast<uint32_t>(std::countr_zero(mask));
  return out;
}

}  // namespace

#include "kernels/cpu/truncate.inc"

}  // namespace fsdc::cpu::avx2

FSDC_END_TARGET
#endif
