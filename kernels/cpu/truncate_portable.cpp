// SPDX-License-Identifier: Apache-2.0
// The loops of truncate for any processor: SSE2 on x86-64, NEON on 64-bit Arm, as the compiler vectorises them.
#include "kernels/cpu/loops_includes.h"
#include "kernels/cpu/truncate.h"
#include "kernels/score_order.h"

namespace fsdc::cpu::portable {

namespace {

using Codes = uint32_t __attribute__((vector_size(16)));

// Bit i: codes[i] >= threshold.
inline uint32_t at_least(Codes codes, uint32_t threshold) {
  const Codes bits = reinterpret_cast<Codes>(codes >= threshold) & Codes{1, 2, 4, 8};
  return (bits[0] | bits[1]) | (bits[2] | bits[3]);
}

// Bit i: scores[i] is not less than `floor`; a NaN never is.
inline uint32_t not_less(const float* scores, float floor) {
  float __attribute__((vector_size(16))) four;
  std::memcpy(&four, scores, sizeof(four));
  return at_least(reinterpret_cast<Codes>(~(four < floor)), 1u);
}

// Writes start + i for each set bit i of the mask, in order; returns the end of what it wrote.
inline uint32_t* append_set_bits(uint64_t mask, uint32_t start, uint32_t* out) {
  for (; mask != 0; mask &= mask - 1) *out++ = start + static_cast<uint32_t>(std::countr_zero(mask));
  return out;
}

}  // namespace

#include "kernels/cpu/truncate.inc"

}  // namespace fsdc::cpu::portable
