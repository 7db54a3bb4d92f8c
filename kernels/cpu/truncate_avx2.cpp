// SPDX-License-Identifier: Apache-2.0
// The loops of truncate for x86-64 with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/loops_includes.h"
#include "kernels/cpu/truncate.h"

FSDC_BEGIN_AVX2

namespace fsdc::cpu::avx2 {

namespace {

using Codes = uint32_t __attribute__((vector_size(32)));

// Bit i: codes[i] >= least.
inline uint32_t at_least(Codes codes, uint32_t least) {
  const __m256i code = reinterpret_cast<__m256i>(codes);
  const __m256i larger = _mm256_max_epu32(code, _mm256_set1_epi32(static_cast<int>(least)));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(larger, code))));
}

// Of each mask of eight the numbers of its set bits, ascending, one a byte.
struct SetBits {
  uint64_t of[256] = {};

  constexpr SetBits() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      int found = 0;
      for (uint32_t bit = 0; bit < 8; ++bit) {
        if ((mask >> bit & 1u) != 0) of[mask] |= uint64_t{bit} << (8 * found++);
      }
    }
  }
};
inline constexpr SetBits kSetBits;

inline __m256i set_bits(uint32_t mask) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kSetBits.of[mask])));
}

// Writes start + i for each set bit i of the mask, in order; returns the end of what it wrote. May write 8 more.
inline uint32_t* append_set_bits(uint64_t mask, uint32_t start, uint32_t* out) {
  for (uint32_t i = 0; i < 64; i += 8, mask >>= 8) {
    const uint32_t eight = static_cast<uint32_t>(mask) & 0xffu;
    const __m256i numbers = _mm256_add_epi32(set_bits(eight), _mm256_set1_epi32(static_cast<int>(start + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), numbers);
    out += std::popcount(eight);
  }
  return out;
}

// Writes the codes that are at least `least` but less than `end`, in order; returns the end of what it wrote. May
// write 8 more.
inline uint32_t* append_between(Codes codes, uint32_t least, uint32_t end, uint32_t* out) {
  const uint32_t between = at_least(codes, least) & ~at_least(codes, end);
  const __m256i compressed = _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(codes), set_bits(between));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), compressed);
  return out + std::popcount(between);
}

// Stores a line of 64 bytes, aligned, past the caches.
inline void stream_line(char* out, const char* source) {
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  }
}
inline void end_streams() { _mm_sfence(); }

}  // namespace

#include "kernels/cpu/truncate.inc"

}  // namespace fsdc::cpu::avx2

FSDC_END_TARGET
#endif
