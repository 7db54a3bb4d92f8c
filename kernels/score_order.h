// SPDX-License-Identifier: Apache-2.0
// The order of scores, as unsigned integers: the token with the larger code stays.
//
//   -inf  <  finite, by value, -0 equal to +0  <  NaN of any sign and payload  <  +inf
//
// It works on the bits, so neither fast-math nor flush-to-zero modes can change which tokens stay. (They can change the
// sums of attention weights, which are arithmetic; scores of another type or layout are copied without any.)
#pragma once

#include "types.h"

namespace fsdc {

constexpr uint32_t kCodeOfNaN = 0xff800000u;  // one above the largest finite score
constexpr uint32_t kCodeOfInfinity = 0xffffffffu;

// Without branches, so that compilers vectorise it.
FSDC_HOST_DEVICE constexpr uint32_t score_code(uint32_t bits) {
  const uint32_t sign = 0u - (bits >> 31);                                          // all ones where negative
  uint32_t code = (bits ^ (sign | 0x80000000u)) + (bits == 0x80000000u ? 1u : 0u);  // -0 becomes +0
  code = (bits & 0x7fffffffu) > 0x7f800000u ? kCodeOfNaN : code;
  return bits == 0x7f800000u ? kCodeOfInfinity : code;
}

}  // namespace fsdc
