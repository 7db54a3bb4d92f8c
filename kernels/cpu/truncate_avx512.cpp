// SPDX-License-Identifier: Apache-2.0
// The loops of truncate for x86-64 with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/loops_includes.h"
#include "kernels/cpu/truncate.h"
#include "kernels/score_order.h"

FSDC_BEGIN_AVX512

namespace fsdc::cpu::avx512 {

namespace {

using Codes = uint32_t __attribute__((vector_size(64)));

// Bit i: codes[i] >= threshold.
inline uint32_t at_least(Codes codes, uint32_t threshold) {
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(codes), _mm512_set1_epi32(static_cast<int>(threshold)));
}

// Bit i: scores[i] is not less than `floor`; a NaN never is.
inline uint32_t not_less(const float* scores, float floor) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), _mm512_set1_ps(floor), _CMP_NLT_UQ);
}

// Writes start + i for each set bit i of the mask, in order; returns the end of what it wrote. May write 16 more.
inline uint32_t* append_set_bits(uint64_t mask, uint32_t start, uint32_t* out) {
  __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int i = 0; i < 64; i += 16, mask >>= 16) {
    const __mmask16 sixteen = static_cast<__mmask16>(mask);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(sixteen, numbers));
    out += _mm_popcnt_u32(sixteen);
    numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
  }
  return out;
}

}  // namespace

#include "kernels/cpu/truncate.inc"

}  // namespace fsdc::cpu::avx512

FSDC_END_TARGET
#endif
