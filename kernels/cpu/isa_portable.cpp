// SPDX-License-Identifier: Apache-2.0
// The loops for any processor: SSE2 on x86-64, NEON on 64-bit Arm, as the compiler vectorises them.
#include "kernels/cpu/loops_includes.h"

namespace fsdc::cpu::portable {

static_assert(std::endian::native == std::endian::little, "at_least packs bytes in little-endian order");

inline constexpr const char* kIsa = "portable";

// Bit i: keys[i] >= threshold, for 64 keys.
inline uint64_t at_least(const uint32_t* keys, uint32_t threshold) {
  uint8_t hits[64];
  for (int i = 0; i < 64; ++i) hits[i] = keys[i] >= threshold;
  uint64_t mask = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t eight;  // bytes of 0 or 1, the first lowest; the product gathers them in the top byte
    std::memcpy(&eight, hits + i, sizeof(eight));
    mask |= (eight * 0x0102040810204080u >> 56) << i;
  }
  return mask;
}

#include "kernels/cpu/loops.inc"

}  // namespace fsdc::cpu::portable
