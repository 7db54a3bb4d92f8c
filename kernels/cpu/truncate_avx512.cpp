// SPDX-License-Identifier: Apache-2.0
// The loops of truncate for x86-64 with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/loops_includes.h"
#include "kernels/cpu/truncate.h"

FSDC_BEGIN_AVX512

namespace fsdc::cpu::avx512 {

namespace {

using Codes = uint32_t __attribute__((vector_size(64)));

// Bit i: codes[i] >= least.
inline uint32_t at_least(Codes codes, uint32_t least) {
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(codes), _mm512_set1_epi32(static_cast<int>(least)));
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

// Writes the codes that are at least `least` but less than `end`, in order; returns the end of what it wrote. May
// write 16 more.
inline uint32_t* append_between(Codes codes, uint32_t least, uint32_t end, uint32_t* out) {
  const __m512i all = reinterpret_cast<__m512i>(codes);
  const __mmask16 reach = _mm512_cmpge_epu32_mask(all, _mm512_set1_epi32(static_cast<int>(least)));
  const __mmask16 between = _mm512_mask_cmplt_epu32_mask(reach, all, _mm512_set1_epi32(static_cast<int>(end)));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(between, all));
  return out + _mm_popcnt_u32(between);
}

// Stores a line of 64 bytes, aligned, past the caches.
inline void stream_line(char* out, const char* source) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(source));
}
inline void end_streams() { _mm_sfence(); }

}  // namespace

#include "kernels/cpu/truncate.inc"

}  // namespace fsdc::cpu::avx512

FSDC_END_TARGET
#endif
