// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>

#include "kernels/cpu/element.h"

using fsdc::cpu::BFloat16;
using fsdc::cpu::convert;
using fsdc::cpu::convert_unflushed;
using fsdc::cpu::Float16;

namespace {

// A float16 by its definition: sign, 5 bits of exponent, 10 bits of fraction.
double value_of_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

}  // namespace

TEST_CASE("every float16 has the value of its definition, and comes back") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{uint16_t(bits)};
    const double expected = value_of_float16(half.bits);
    const float actual = convert<float>(half);
    CAPTURE(bits);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(actual));
      REQUIRE((convert<Float16>(actual).bits & 0x7fffu) == 0x7e00u);
    } else {
      REQUIRE(double(actual) == expected);
      REQUIRE(std::signbit(actual) == std::signbit(expected));
      REQUIRE(convert<Float16>(actual).bits == half.bits);
    }
  }
}

TEST_CASE("rounding to float16 goes to the nearest, ties to even") {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {  // between each finite pair of neighbours
    const double low = value_of_float16(uint16_t(bits)), high = value_of_float16(uint16_t(bits + 1));
    const float middle = float((low + high) / 2);
    CAPTURE(bits);
    REQUIRE(convert<Float16>(middle).bits == (bits % 2 == 0 ? bits : bits + 1));
    REQUIRE(convert<Float16>(std::nextafter(middle, 0.0f)).bits == bits);
    REQUIRE(convert<Float16>(std::nextafter(middle, 1e9f)).bits == bits + 1);
  }
  CHECK(convert<Float16>(65519.996f).bits == 0x7bff);
  CHECK(convert<Float16>(65520.0f).bits == 0x7c00);  // to infinity
  CHECK(convert<Float16>(-1e30f).bits == 0xfc00);
}

TEST_CASE("rounding float64 to float32 goes to the nearest, ties to even, subnormals too") {
  for (uint32_t bits = 0; bits < 0x7f000000u; bits += bits < 0x01000000u ? 997 : 99991) {
    for (const double sign : {1.0, -1.0}) {
      const double low = std::bit_cast<float>(bits), high = std::bit_cast<float>(bits + 1), middle = (low + high) / 2;
      for (const double value : {low, middle, std::nextafter(middle, 0.0), std::nextafter(middle, high), high}) {
        CAPTURE(bits, value);
        const auto bits_of = [](float x) { return std::bit_cast<uint32_t>(x); };
        REQUIRE(bits_of(convert_unflushed(sign * value)) == bits_of(static_cast<float>(sign * value)));
      }
    }
  }
  CHECK(convert_unflushed(0x1p-1074) == 0);
  CHECK(convert_unflushed(0x1.fffffffp-127) == 0x1p-126f);  // the largest subnormal is too small for it
  CHECK(convert_unflushed(-1e300) == -std::numeric_limits<float>::infinity());
  CHECK(std::isnan(convert_unflushed(std::nan(""))));
}

TEST_CASE("every bfloat16 comes back, and rounding goes to the nearest, ties to even") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = convert<float>(BFloat16{uint16_t(bits)});
    REQUIRE(std::bit_cast<uint32_t>(value) == bits << 16);
    if (!std::isnan(value)) REQUIRE(convert<BFloat16>(value).bits == bits);
  }
  CHECK(convert<BFloat16>(std::bit_cast<float>(0x3f808000u)).bits == 0x3f80);
  CHECK(convert<BFloat16>(std::bit_cast<float>(0x3f818000u)).bits == 0x3f82);
  CHECK(convert<BFloat16>(std::bit_cast<float>(0x3f808001u)).bits == 0x3f81);
  CHECK(convert<BFloat16>(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(convert<BFloat16>(std::nanf("")).bits == 0x7fc0);
}
