// SPDX-License-Identifier: Apache-2.0
// Intrinsics of one thread: each step rounded to nearest even, none fused.
#include <cmath>

#include "errors.h"

TEST_CASE("arithmetic: sums and products are rounded one by one") {
  volatile float one = 1, small = 0x1p-24f, third = 1.0f / 3;
  CHECK(__fadd_rn(one, small) == 1.0f);                     // a tie goes to even
  CHECK(__fadd_rn(one + 0x1p-23f, small) == 1 + 0x1p-22f);  // and up, where that is even
  const float product = __fmul_rn(third, third);
  CHECK(__fadd_rn(product, -product) == 0.0f);  // fused, the rounding error would be left
  CHECK(__fadd_rn(__fmul_rn(third, third), -product) == 0.0f);
  CHECK(std::fma(third, third, -product) != 0.0f);
  CHECK(__dadd_rn(1.0, 0x1p-53) == 1.0);
  CHECK(__double2float_rn(1 + 0x1p-24) == 1.0f);
  CHECK(__double2float_rn(1 + 0x1p-24 + 0x1p-40) == 1 + 0x1p-23f);
}

TEST_CASE("arithmetic: bits") {
  CHECK(__popc(0) == 0);
  CHECK(__popc(0xf0000001u) == 5);
  CHECK(__float_as_uint(-0.0f) == 0x80000000u);
  CHECK(__float_as_uint(1.0f) == 0x3f800000u);
}
