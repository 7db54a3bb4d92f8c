// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <limits>

#include "kernels/score_order.h"

namespace {

uint32_t code(float score) { return fsdc::score_code(std::bit_cast<uint32_t>(score)); }

constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("keys rise with the rank of the score") {
  const float ascending[] = {-kInf,
                             -std::numeric_limits<float>::max(),
                             -1.0f,
                             -1e-45f,
                             0.0f,
                             1e-45f,
                             1.0f,
                             std::numeric_limits<float>::max(),
                             std::numeric_limits<float>::quiet_NaN(),
                             kInf};
  for (size_t i = 1; i < std::size(ascending); ++i) {
    CAPTURE(i, ascending[i]);
    CHECK(code(ascending[i - 1]) < code(ascending[i]));
  }
}

TEST_CASE("zeros of both signs are equal, and so is every NaN") {
  CHECK(code(-0.0f) == code(0.0f));
  for (uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc00000u, 0xffffffffu}) {
    CHECK(fsdc::score_code(bits) == fsdc::kCodeOfNaN);
  }
}

TEST_CASE("no score has the code of a missing one, 0") { CHECK(code(-kInf) > 0); }

TEST_CASE("codes keep the order of neighbouring floats") {
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 977) {
    CHECK(fsdc::score_code(bits + 1) > fsdc::score_code(bits));
    CHECK(fsdc::score_code((bits + 1) | 0x80000000u) < fsdc::score_code(bits | 0x80000000u));
  }
}
