// SPDX-License-Identifier: Apache-2.0
// Grids: every thread runs once and knows who it is.
#include <vector>

#include "errors.h"

using namespace simt;

TEST_CASE("launch: every thread of every block runs once") {
  in_every_order([] {
    constexpr unsigned kBlocks = 2 * 3 * 4, kThreads = 5 * 4 * 3;
    std::vector<int> runs(kBlocks * kThreads, 0);
    run_grid({.blocks = dim3(2, 3, 4), .threads = dim3(5, 4, 3)}, [&] {
      if (gridDim.x != 2 || gridDim.y != 3 || gridDim.z != 4) fail(Site::current(), "wrong grid");
      if (blockDim.x != 5 || blockDim.y != 4 || blockDim.z != 3) fail(Site::current(), "wrong block");
      const unsigned block = (blockIdx.z * 3 + blockIdx.y) * 2 + blockIdx.x;
      const unsigned number = (threadIdx.z * 4 + threadIdx.y) * 5 + threadIdx.x;
      if (running->lane() != number % 32 || running->warp() != number / 32) fail(Site::current(), "wrong lane");
      ++runs[block * kThreads + number];
    });
    CHECK(runs == std::vector<int>(kBlocks * kThreads, 1));
  });
}

TEST_CASE("launch: threads take turns in the order that was asked for, after a barrier too") {
  const KeepOptions keep;
  const auto turns = [](unsigned blocks, unsigned threads, unsigned cluster) {
    std::vector<unsigned> seen(2 * blocks * threads);
    unsigned turn = 0;
    run_grid({.blocks = blocks, .threads = threads, .cluster = cluster}, [&] {
      seen[atomicAdd(&turn, 1u)] = blockIdx.x * 10 + threadIdx.x;
      cluster > 1 ? cluster_barrier(Site::current()) : __syncthreads();
      seen[atomicAdd(&turn, 1u)] = blockIdx.x * 10 + threadIdx.x;
    });
    return seen;
  };
  using Turns = std::vector<unsigned>;
  CHECK(turns(1, 4, 1) == Turns{0, 1, 2, 3, 0, 1, 2, 3});
  CHECK(turns(2, 2, 2) == Turns{0, 1, 10, 11, 0, 1, 10, 11});
  options().order = Order::kReverse;
  CHECK(turns(1, 8, 1) == Turns{7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0});
  CHECK(turns(2, 2, 1) == Turns{11, 10, 11, 10, 1, 0, 1, 0});
  CHECK(turns(2, 2, 2) == Turns{11, 10, 1, 0, 11, 10, 1, 0});
  options().resident_clusters = 2;
  CHECK(turns(2, 2, 1) == Turns{11, 10, 1, 0, 11, 10, 1, 0});
}

TEST_CASE("launch: arguments are copies of the parameters' types") {
  int64_t out = 0;
  launch(+[](int64_t* to, int64_t value) { *to = value; }, {.blocks = 1, .threads = 1}, &out, 7);
  CHECK(out == 7);
}

TEST_CASE("launch: what a device refuses") {
  const auto nothing = [] {};
  CHECK_THAT(error_of({.blocks = 0, .threads = 1}, nothing), ContainsSubstring("1 block or more"));
  CHECK_THAT(error_of({.blocks = dim3(1, 65536), .threads = 1}, nothing), ContainsSubstring("65535 along y"));
  CHECK_THAT(error_of({.blocks = 1, .threads = 1025}, nothing), ContainsSubstring("1 to 1024 threads"));
  CHECK_THAT(error_of({.blocks = 1, .threads = 0}, nothing), ContainsSubstring("1 to 1024 threads"));
  CHECK_THAT(error_of({.blocks = 1, .threads = 1, .dynamic_shared_bytes = (227 << 10) + 1}, nothing),
             ContainsSubstring("dynamic shared memory"));
  CHECK_THAT(error_of({.blocks = 3, .threads = 1, .cluster = 3}, nothing), ContainsSubstring("clusters of 1, 2, 4"));
  CHECK_THAT(error_of({.blocks = 3, .threads = 1, .cluster = 2}, nothing), ContainsSubstring("whole clusters"));
  const KeepOptions keep;
  options().largest_cluster = 2;
  CHECK(error_of({.blocks = 4, .threads = 1, .cluster = 2}, nothing) == "no error");
  CHECK_THAT(error_of({.blocks = 4, .threads = 1, .cluster = 4}, nothing), ContainsSubstring("fit on the device"));
}

TEST_CASE("launch: the runtime is usable after an error") {
  for (int i = 0; i < 3; ++i) {
    const std::string broken = line(2);
    const std::string error = error_of({.blocks = 4, .threads = 64}, [] {
      if (threadIdx.x == 3 && blockIdx.x == 1) fail(Site::current(), "broken %d", 5);
      __syncthreads();
    });
    CHECK_THAT(error, ContainsSubstring("simt: broken 5 at " + broken) &&
                          ContainsSubstring("block (1, 0, 0), thread (3, 0, 0)"));
    int runs = 0;
    run_grid({.blocks = 1, .threads = 40}, [&] { atomicAdd(&runs, 1); });
    CHECK(runs == 40);
  }
}
