// SPDX-License-Identifier: Apache-2.0
// The loops of truncate for any processor: SSE2 on x86-64, NEON on 64-bit Arm, as the compiler vectorises them.
#include "kernels/cpu/loops_includes.h"
#include "kernels/cpu/truncate.h"

namespace fsdc::cpu::portable {

namespace {

using Codes = uint32_t __attribute__((vector_size(16)));

// Bit i: codes[i] >= least.
inline uint32_t at_least(Codes codes, uint32_t least) {
  const Codes bits = reinterpret_cast<Codes>(codes >= least) & Codes{1, 2, 4, 8};
  return (bits[0] | bits[1]) | (bits[2] | bits[3]);
}

// Writes start + i for each set bit i of the mask, in order; returns the end of what it wrote.
inline uint32_t* append_set_bits(uint64_t mask, uint32_t start, uint32_t* out) {
  for (; mask != 0; mask &= mask - 1) *out++ = start + static_cast<uint32_t>(std::countr_zero(mask));
  return out;
}

// Writes the codes that are at least `least` but less than `end`, in order; returns the end of what it wrote.
inline uint32_t* append_between(Codes codes, uint32_t least, uint32_t end, uint32_t* out) {
  for (uint32_t mask = at_least(codes, least) & ~at_least(codes, end); mask != 0; mask &= mask - 1) {
    *out++ = codes[std::countr_zero(mask)];
  }
  return out;
}

// Without instructions for it a line is stored like any other.
inline void stream_line(char* out, const char* source) { std::memcpy(out, source, 64); }
inline void end_streams() {}

}  // namespace

#include "kernels/cpu/truncate.inc"

}  // namespace fsdc::cpu::portable
