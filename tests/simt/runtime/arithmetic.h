// SPDX-License-Identifier: Apache-2.0
// What one thread does alone: bits, rounding, loads. Compile with -ffp-contract=off: these must not be fused.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "thread.h"

using std::max;
using std::min;

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

// Rounded to nearest, ties to even, as is all that C++ does by default.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __double2float_rn(double value) { return static_cast<float>(value); }

// Cache hints mean nothing here.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
