// SPDX-License-Identifier: Apache-2.0
// The loops for x86-64 with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/loops_includes.h"

FSDC_BEGIN_TARGET("avx2,bmi,avx512f,avx512bw,avx512dq,avx512vl")

namespace fsdc::cpu::avx512 {

inline constexpr const char* kIsa = "avx512";

// Bit i: keys[i] >= threshold, for 64 keys.
inline uint64_t at_least(const uint32_t* keys, uint32_t threshold) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  uint64_t mask = 0;
  for (int i = 0; i < 64; i += 16) {
    mask |= uint64_t{_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), limit)} << i;
  }
  return mask;
}

#include "kernels/cpu/loops.inc"

}  // namespace fsdc::cpu::avx512

FSDC_END_TARGET
#endif
