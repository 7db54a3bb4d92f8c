// SPDX-License-Identifier: Apache-2.0
// Shuffles, votes and reductions against the definitions of the PTX manual.
#include <bit>
#include <vector>

#include "errors.h"

using namespace simt;

namespace {

// shfl.sync as the PTX manual writes it down: a and b are source operands, c holds clamp and segment mask.
enum class Mode { kUp, kDown, kButterfly, kIndex };
int ptx_source(Mode mode, int lane, int b, int width) {
  const int segment_mask = 32 - width;
  const int clamp = mode == Mode::kUp ? 0 : 31;
  const int last = (lane & segment_mask) | (clamp & ~segment_mask);
  const int first = lane & segment_mask;
  int source = 0;
  bool is_valid = false;
  switch (mode) {
    case Mode::kUp:
      source = lane - b;
      is_valid = source >= last;
      break;
    case Mode::kDown:
      source = lane + b;
      is_valid = source <= last;
      break;
    case Mode::kButterfly:
      source = lane ^ b;
      is_valid = source <= last;
      break;
    case Mode::kIndex:
      source = first | (b & ~segment_mask);
      is_valid = source <= last;
      break;
  }
  return is_valid ? source : lane;
}

}  // namespace

TEST_CASE("warps: shuffles read the lane that the PTX manual names") {
  in_every_order([] {
    for (const int width : {1, 2, 4, 8, 16, 32}) {
      for (int b = 0; b < 32; ++b) {
        int up[32], down[32], butterfly[32], index[32];
        run_grid({.blocks = 1, .threads = 32}, [&] {
          const int lane = int(threadIdx.x);
          up[lane] = __shfl_up_sync(~0u, lane, unsigned(b), width);
          down[lane] = __shfl_down_sync(~0u, lane, unsigned(b), width);
          butterfly[lane] = __shfl_xor_sync(~0u, lane, b, width);
          index[lane] = __shfl_sync(~0u, lane, b, width);
        });
        for (int lane = 0; lane < 32; ++lane) {
          CAPTURE(width, b, lane);
          REQUIRE(up[lane] == ptx_source(Mode::kUp, lane, b, width));
          REQUIRE(down[lane] == ptx_source(Mode::kDown, lane, b, width));
          REQUIRE(butterfly[lane] == ptx_source(Mode::kButterfly, lane, b, width));
          REQUIRE(index[lane] == ptx_source(Mode::kIndex, lane, b, width));
        }
      }
    }
  });
}

TEST_CASE("warps: shuffles of 8 bytes, and from a lane that took no part") {
  double eight[64];
  unsigned undefined[32];
  run_grid({.blocks = 1, .threads = 64}, [&] {
    const unsigned number = threadIdx.x;
    eight[number] = __shfl_sync(~0u, number + 0.5, 7);
    if (number < 16) undefined[number] = __shfl_sync(0xffffu, number, 20);
  });
  for (unsigned i = 0; i < 64; ++i) CHECK(eight[i] == i / 32 * 32 + 7.5);
  for (unsigned i = 0; i < 16; ++i) CHECK(undefined[i] == 0xa5a5a5a5u);
}

TEST_CASE("warps: votes and reductions are over the lanes of the mask") {
  in_every_order([] {
    unsigned ballot[96], sum[96], least[96], most[96];
    int any[96], all[96];
    run_grid({.blocks = 1, .threads = 80}, [&] {  // the last warp has 16 lanes
      const unsigned number = threadIdx.x, lane = number % 32;
      const unsigned mask = number >= 64 ? ~0u : lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
      const int predicate = number % 3 == 0;
      ballot[number] = __ballot_sync(mask, predicate);
      any[number] = __any_sync(mask, lane == 31);
      all[number] = __all_sync(mask, number >= 64 || lane % 2 == 0);
      sum[number] = __reduce_add_sync(mask, number);
      least[number] = __reduce_min_sync(mask, number);
      most[number] = __reduce_max_sync(mask, number);
    });
    for (unsigned i = 0; i < 80; ++i) {
      const unsigned first = i / 32 * 32;
      unsigned expected_ballot = 0, expected_sum = 0, expected_least = ~0u, expected_most = 0;
      for (unsigned j = first; j < std::min(first + 32, 80u); ++j) {
        if (i < 64 && i % 2 != j % 2) continue;
        if (j % 3 == 0) expected_ballot |= 1u << (j - first);
        expected_sum += j;
        expected_least = std::min(expected_least, j);
        expected_most = std::max(expected_most, j);
      }
      CAPTURE(i);
      CHECK(ballot[i] == expected_ballot);
      CHECK(any[i] == (i < 64 && i % 2 == 1));
      CHECK(all[i] == (i >= 64 || i % 2 == 0));
      CHECK(sum[i] == expected_sum);
      CHECK(least[i] == expected_least);
      CHECK(most[i] == expected_most);
    }
  });
}

TEST_CASE("warps: __syncwarp waits for the lanes of its mask") {
  in_every_order([] {
    int came = 0, all_came = 1;
    run_grid({.blocks = 1, .threads = 32}, [&] {
      if (threadIdx.x >= 12) return;
      atomicAdd(&came, 1);
      __syncwarp(0xfffu);
      atomicMin(&all_came, int(came == 12));
    });
    CHECK(all_came == 1);
  });
}

TEST_CASE("warps: wrong masks are errors") {
  in_every_order([] {
    const std::string not_in = line(2);
    const std::string error_not_in =
        error_of({.blocks = 1, .threads = 32}, [] { __syncwarp(1u << ((threadIdx.x + 1) % 32)); });
    CHECK_THAT(error_not_in, ContainsSubstring("does not name the calling lane") && ContainsSubstring(not_in));
    const std::string exited = line(4);
    const std::string error_exited = error_of({.blocks = 1, .threads = 32}, [] {
      if (threadIdx.x == 5) return;
      __nanosleep(1);
      __ballot_sync(~0u, 1);
    });
    CHECK_THAT(error_exited, ContainsSubstring("names lane 5, which has exited") && ContainsSubstring(exited));
    const std::string beyond = error_of({.blocks = 1, .threads = 16}, [] { __ballot_sync(0x1ffffu, 1); });
    CHECK_THAT(beyond, ContainsSubstring("names lanes that do not exist"));
    const std::string one = line(3), other = line(5);
    const std::string divergent = error_of({.blocks = 1, .threads = 32}, [] {
      if (threadIdx.x < 16) {
        __ballot_sync(~0u, 1);
      } else {
        __ballot_sync(~0u, 0);
      }
    });
    CHECK_THAT(divergent, ContainsSubstring("divergent warp") && ContainsSubstring(one) && ContainsSubstring(other));
    const std::string width = error_of({.blocks = 1, .threads = 32}, [] { __shfl_sync(~0u, 1, 0, 5); });
    CHECK_THAT(width, ContainsSubstring("shuffle of width 5"));
  });
}
