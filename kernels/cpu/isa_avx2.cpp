// SPDX-License-Identifier: Apache-2.0
// The loops for x86-64 with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/loops_includes.h"

FSDC_BEGIN_TARGET("avx2,bmi")

namespace fsdc::cpu::avx2 {

inline constexpr const char* kIsa = "avx2";

// Bit i: keys[i] >= threshold, for 64 keys.
inline uint64_t at_least(const uint32_t* keys, uint32_t threshold) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(threshold));
  uint64_t mask = 0;
  for (int i = 0; i < 64; i += 8) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i hit = _mm256_cmpeq_epi32(_mm256_max_epu32(key, limit), key);
    mask |= uint64_t(unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(hit)))) << i;
  }
  return mask;
}

#include "kernels/cpu/loops.inc"

}  // namespace fsdc::cpu::avx2

FSDC_END_TARGET
#endif
