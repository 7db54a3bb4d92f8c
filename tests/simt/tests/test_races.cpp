// SPDX-License-Identifier: Apache-2.0
// The race checker: planted bugs must be found, in any order of threads, and what is right must pass.
#if defined(__SANITIZE_THREAD__)

#include <vector>

#include "errors.h"
#include "kernels/cuda/cluster.cuh"

using namespace simt;
using fsdc::cuda::cluster_map;
using fsdc::cuda::cluster_sync;

namespace {

// Which of the steps that order memory a kernel takes.
struct Steps {
  bool first = true, second = true;
};

// Runs the kernel whole, then without each of its steps, in every order. `ticket` starts at 0 each time.
template <class Kernel>
void check_each_step_is_needed(const Grid& grid, Kernel kernel) {
  in_every_order([&] {
    const auto run = [&](Steps steps) {
      unsigned ticket = 0;
      return error_of(grid, [&] { kernel(steps, ticket); });
    };
    CHECK(run({}) == "no error");
    CHECK_THAT(run({.first = false}), ContainsSubstring("simt: race:"));
    CHECK_THAT(run({.second = false}), ContainsSubstring("simt: race:"));
  });
}

}  // namespace

TEST_CASE("races: both accesses are named") {
  const std::string write = line(5), read = line(7);
  const std::string error = error_of({.blocks = 1, .threads = 2}, [] {
    FSDC_SHARED(value, int);
    volatile int seen = 0;
    if (threadIdx.x == 0) {
      value = 1;
    } else {
      seen = value;
    }
    (void)seen;
  });
  CHECK_THAT(error, ContainsSubstring("race: read of") &&
                        ContainsSubstring("at " + read + ", not ordered after the write") &&
                        ContainsSubstring("by block 0 thread 0 at " + write) && ContainsSubstring("thread (1, 0, 0)"));
}

TEST_CASE("races: shared memory and a barrier on each side") {
  std::vector<int> out(64);
  check_each_step_is_needed({.blocks = 1, .threads = 64}, [&](Steps steps, unsigned&) {
    FSDC_SHARED(values, int[64]);
    for (int round = 0; round < 2; ++round) {
      values[threadIdx.x] = round;
      if (steps.first) __syncthreads();
      out[threadIdx.x] = values[63 - threadIdx.x];
      if (steps.second) __syncthreads();
    }
  });
}

TEST_CASE("races: shared memory within a warp") {
  std::vector<int> out(32);
  check_each_step_is_needed({.blocks = 1, .threads = 32}, [&](Steps steps, unsigned&) {
    FSDC_SHARED(values, int[32]);
    for (int round = 0; round < 2; ++round) {
      values[threadIdx.x] = round;
      if (steps.first) __syncwarp();
      out[threadIdx.x] = values[31 - threadIdx.x];
      if (steps.second) __syncwarp();
    }
  });
}

TEST_CASE("races: a shuffle orders nothing") {
  int value = 0, seen = 0;
  const std::string error = error_of({.blocks = 1, .threads = 32}, [&] {
    if (threadIdx.x == 0) value = 1;
    __shfl_sync(~0u, 1, 0);
    if (threadIdx.x == 1) seen = value;
  });
  CHECK_THAT(error, ContainsSubstring("race"));
}

TEST_CASE("races: a warp's barrier orders its own lanes only") {
  int value = 0, seen = 0;
  in_every_order([&] {
    const std::string error = error_of({.blocks = 1, .threads = 64}, [&] {
      if (threadIdx.x == 0) value = 1;
      __syncwarp();
      if (threadIdx.x == 32) seen = value;
    });
    CHECK_THAT(error, ContainsSubstring("race"));
  });
}

TEST_CASE("races: the message of the last block") {
  std::vector<int> parts(4);
  int total = 0;
  check_each_step_is_needed({.blocks = 4, .threads = 1}, [&](Steps steps, unsigned& ticket) {
    parts[blockIdx.x] = 1;
    if (steps.first) __threadfence();
    const bool is_last = atomicInc(&ticket, 3) == 3;
    if (steps.second) __threadfence();
    if (!is_last) return;
    for (const int part : parts) total += part;
  });
}

TEST_CASE("races: what a thread has heard, a barrier tells its block") {
  std::vector<int> parts(4);
  int total = 0;
  check_each_step_is_needed({.blocks = 4, .threads = 64}, [&](Steps steps, unsigned& ticket) {
    FSDC_SHARED(is_last, bool);
    if (threadIdx.x == 5) parts[blockIdx.x] = 1;
    if (steps.first) __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      is_last = atomicInc(&ticket, 3) == 3;
      __threadfence();
    }
    if (steps.second) __syncthreads();
    if (!is_last || threadIdx.x != 63) return;
    for (const int part : parts) total += part;
  });
}

TEST_CASE("races: plain arithmetic where an atomic is needed, and both at once") {
  int sum = 0;
  in_every_order([&] {
    CHECK_THAT(error_of({.blocks = 1, .threads = 32}, [&] { ++sum; }), ContainsSubstring("race"));
    const std::string mixed = error_of({.blocks = 1, .threads = 2}, [&] {
      if (threadIdx.x == 0) {
        atomicAdd(&sum, 1);
      } else {
        ++sum;
      }
    });
    CHECK_THAT(mixed, ContainsSubstring("race"));
  });
}

TEST_CASE("races: an atomic does not hide a write of the same thread") {
  in_every_order([] {
    const std::string error = error_of({.blocks = 1, .threads = 64}, [] {
      FSDC_SHARED(count, int);
      if (threadIdx.x == 0) count = 0;
      __shfl_sync(~0u, 1, 0);
      if (threadIdx.x % 32 == 0) atomicAdd(&count, 1);
    });
    CHECK_THAT(error, ContainsSubstring("race"));
  });
}

TEST_CASE("races: an atomic does not hide those of others from the thread that came last") {
  in_every_order([] {
    int out = 0;
    const std::string error = error_of({.blocks = 1, .threads = 64}, [&] {
      FSDC_SHARED(sum, int);
      if (threadIdx.x == 0) sum = 0;
      __syncthreads();
      atomicAdd(&sum, 1);
      if (threadIdx.x == blockDim.x - 1) out = sum;
    });
    CHECK_THAT(error, ContainsSubstring("race"));
  });
}

TEST_CASE("races: two blocks write one element") {
  in_every_order([] {
    std::vector<char> out(33);
    const auto write = [&](unsigned width) { return [&out, width] { out[blockIdx.x * width + threadIdx.x] = 1; }; };
    CHECK(error_of({.blocks = 2, .threads = 16}, write(16)) == "no error");
    CHECK_THAT(error_of({.blocks = 2, .threads = 16}, write(15)), ContainsSubstring("race: write"));
  });
}

TEST_CASE("races: a cluster's barrier orders its blocks, and no others") {
  std::vector<int> out(4);
  check_each_step_is_needed({.blocks = 4, .threads = 32, .cluster = 4}, [&](Steps steps, unsigned&) {
    FSDC_SHARED(values, int[32]);
    cluster_sync();  // all have started
    for (int round = 0; round < 2; ++round) {
      values[threadIdx.x] = round;
      if (steps.first) cluster_sync();
      const int* const of_next = cluster_map(values, (cluster_rank() + 1) % 4);
      if (threadIdx.x == 3) out[blockIdx.x] = of_next[7];
      if (steps.second) cluster_sync();
    }
  });
  CHECK_THAT(error_of({.blocks = 4, .threads = 1, .cluster = 2},
                      [&] {
                        if (blockIdx.x == 0) out[0] = 1;
                        cluster_sync();
                        if (blockIdx.x == 3) out[0] = 2;
                      }),
             ContainsSubstring("race"));
}

TEST_CASE("races: a block's barrier is no cluster's barrier") {
  std::vector<int> out(2);
  in_every_order([&] {
    CHECK_THAT(error_of({.blocks = 2, .threads = 32, .cluster = 2},
                        [&] {
                          FSDC_SHARED(value, int);
                          cluster_sync();
                          if (threadIdx.x == 0) value = 1;
                          __syncthreads();
                          if (threadIdx.x == 0) out[blockIdx.x] = *cluster_map(&value, 1 - cluster_rank());
                          cluster_sync();
                        }),
               ContainsSubstring("race"));
  });
}

TEST_CASE("races: a block exits while a peer reads its shared memory") {
  std::vector<int> out(2);
  in_every_order([&] {
    const std::string error = error_of({.blocks = 2, .threads = 32, .cluster = 2}, [&] {
      FSDC_SHARED(value, int);
      if (threadIdx.x == 0) value = 1;
      cluster_sync();
      const int* const of_peer = cluster_map(&value, 1 - cluster_rank());
      if (cluster_rank() == 1 && threadIdx.x == 0) out[0] = *of_peer;
    });
    const bool is_found = error.find("at the end of its block") != error.npos || error.find("has exited") != error.npos;
    CAPTURE(error);
    CHECK(is_found);
  });
}

TEST_CASE("races: launches follow each other, and memory of an ended block is new") {
  std::vector<int> out(32);
  run_grid({.blocks = 1, .threads = 32}, [&] { out[threadIdx.x] = 1; });
  run_grid({.blocks = 1, .threads = 32}, [&] { out[31 - threadIdx.x] += 1; });
  CHECK(out == std::vector<int>(32, 2));
  run_grid({.blocks = 20, .threads = 32}, [&] {
    FSDC_SHARED(values, int[32]);
    values[threadIdx.x] = int(blockIdx.x);
  });
}

#endif
