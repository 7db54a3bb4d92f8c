// SPDX-License-Identifier: Apache-2.0
// The element types of CPU kernels and their conversions, in integer arithmetic that any compiler vectorises.
// (_Float16 would do, but g++ has it on x86 only from version 12 on.)
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "kernels/types.h"

namespace fsdc::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Sums are kept in fp32, those of fp64 in fp64.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To convert(From from);

template <>
inline float convert(float from) {
  return from;
}
template <>
inline double convert(double from) {
  return from;
}
template <>
inline float convert(double from) {
  return static_cast<float>(from);
}
template <>
inline float convert(BFloat16 from) {
  return std::bit_cast<float>(uint32_t{from.bits} << 16);
}
template <>
inline float convert(Float16 from) {
  // No step works on an fp32 subnormal, so that flush-to-zero modes change nothing.
  const uint32_t bits = from.bits & 0x7fffu;
  const uint32_t normal = (bits << 13) + 0x38000000u;                       // the exponents' biases differ by 112
  const float subnormal = std::bit_cast<float>(0x3f000000u + bits) - 0.5f;  // bits * 2^-24
  uint32_t magnitude = bits < 0x0400u ? std::bit_cast<uint32_t>(subnormal) : normal;
  magnitude = bits >= 0x7c00u ? (bits << 13) | 0x7f800000u : magnitude;  // inf and NaN
  return std::bit_cast<float>(magnitude | (from.bits & 0x8000u) << 16);
}

// To the nearest, ties to even; every NaN becomes the quiet one.
template <>
inline BFloat16 convert(float from) {
  const uint32_t bits = std::bit_cast<uint32_t>(from);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 convert(float from) {
  const uint32_t bits = std::bit_cast<uint32_t>(from);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and above
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds the value to a multiple of 2^-24
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

// The same, but in flush-to-zero modes too: an fp32 subnormal is not made by arithmetic.
template <class From>
inline float convert_unflushed(From from) {
  return convert<float>(from);
}
template <>
inline float convert_unflushed(double from) {
  constexpr double kUlps = 0x1p-97;  // from here on numbers are 2^-149 apart, as fp32 subnormals are
  const uint64_t bits = std::bit_cast<uint64_t>(from);
  const double magnitude = std::bit_cast<double>(bits & ~(uint64_t{1} << 63));
  if (!(magnitude < 0x1p-126)) return static_cast<float>(from);
  const uint64_t subnormal = std::bit_cast<uint64_t>(magnitude + kUlps) - std::bit_cast<uint64_t>(kUlps);
  return std::bit_cast<float>(static_cast<uint32_t>(subnormal | bits >> 63 << 31));
}

// Calls body with a value of the C++ type that `dtype` names.
template <class Body>
inline void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat64:
      return body(double{});
  }
}

}  // namespace fsdc::cpu
