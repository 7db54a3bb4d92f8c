// SPDX-License-Identifier: Apache-2.0
// Numbers to feed kernels with, as bytes of any element type, and comparison bit by bit.
#pragma once

#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels/cpu/element.h"

namespace fsdc::test {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline void store(DType dtype, double number, char* at) {
  cpu::with_element_type(dtype, [&](auto element) {
    if constexpr (sizeof element == 8) {
      std::memcpy(at, &number, sizeof number);
    } else {
      const auto rounded = cpu::convert<decltype(element)>(float(number));
      std::memcpy(at, &rounded, sizeof rounded);
    }
  });
}

// `count` numbers of [-1, 1), in steps that no type rounds alike.
inline Bytes random_elements(DType dtype, int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  const int64_t size = element_size(dtype);
  Bytes bytes(static_cast<size_t>(count * size));
  for (int64_t i = 0; i < count; ++i) {
    store(dtype, std::ldexp(double(generator()), -31) - 1, bytes.data() + i * size);
  }
  return bytes;
}

template <class T>
Bytes to_bytes(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

inline bool is_nan(DType dtype, const char* at) {
  bool is_nan = false;
  cpu::with_element_type(dtype, [&](auto element) {
    std::memcpy(&element, at, sizeof element);
    if constexpr (sizeof element == 8) {
      is_nan = std::isnan(element);
    } else {
      is_nan = std::isnan(cpu::convert<float>(element));
    }
  });
  return is_nan;
}

// Equal bits; any NaN equals any NaN. -1, or the first element that differs.
inline int64_t first_difference(DType dtype, const Bytes& actual, const Bytes& expected) {
  REQUIRE(actual.size() == expected.size());
  const int64_t size = element_size(dtype);
  for (int64_t at = 0; at < int64_t(actual.size()); at += size) {
    const char *one = actual.data() + at, *other = expected.data() + at;
    if (std::memcmp(one, other, size_t(size)) == 0 || (is_nan(dtype, one) && is_nan(dtype, other))) continue;
    return at / size;
  }
  return -1;
}

// Rows of scores that selections are known to get wrong.
inline std::map<std::string, std::vector<float>> hostile_scores(int64_t tokens) {
  std::mt19937 generator(uint32_t(tokens) + 1);
  const auto uniform = [&] { return std::generate_canonical<float, 24>(generator); };
  const auto fill = [&](auto score) {
    std::vector<float> scores(static_cast<size_t>(tokens));
    for (size_t i = 0; i < scores.size(); ++i) scores[i] = score(i);
    return scores;
  };
  const auto choice = [&](std::vector<float> from) {
    return fill([&](size_t) { return from[generator() % from.size()]; });
  };
  std::normal_distribution<float> normal;
  return {
      {"random", fill([&](size_t) { return uniform(); })},
      {"all equal", choice({0.25f})},
      {"two values", choice({0.5f, 0.25f})},
      {"zeros of both signs", choice({0.0f, -0.0f})},
      {"all NaN", choice({kNaN, -kNaN})},
      {"all -inf", choice({-kInf})},
      {"all +inf", choice({kInf})},
      {"more +inf than kept", choice({kInf, kInf, 1.0f})},
      {"every kind", choice({kInf, kNaN, -kNaN, 1.0f, 0.0f, -0.0f, 1e-40f, -1.0f, -kInf})},
      {"largest finite and NaN", choice({std::numeric_limits<float>::max(), kNaN})},
      {"denormals", fill([&](size_t) { return uniform() * 1e-40f; })},
      {"lognormal over 30 decades", fill([&](size_t) { return std::exp(17 * normal(generator)); })},
      {"one exponent", fill([&](size_t) { return 1 + uniform() * 0.01f; })},
      {"neighbours in the last bits",
       fill([](size_t i) { return std::bit_cast<float>(0x3f800000u + uint32_t(i % 7)); })},
      {"ascending", fill([](size_t i) { return float(i); })},
      {"descending", fill([](size_t i) { return -float(i); })},
  };
}

}  // namespace fsdc::test
