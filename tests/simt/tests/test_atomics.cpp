// SPDX-License-Identifier: Apache-2.0
// Atomics, and messages between blocks by fence and atomic.
#include <vector>

#include "errors.h"

using namespace simt;

TEST_CASE("atomics: what they leave and what they return") {
  in_every_order([] {
    unsigned sum = 0, least = ~0u, most = 0, last = ~0u, ring = 0;
    float real = 0;
    std::vector<int> tickets(64, 0);
    run_grid({.blocks = 2, .threads = 32}, [&] {
      const unsigned number = blockIdx.x * 32 + threadIdx.x;
      const unsigned ticket = atomicAdd(&sum, 1u);
      atomicAdd(&tickets[ticket], 1);
      atomicAdd(&real, 0.5f);
      atomicMin(&least, number + 3);
      atomicMax(&most, number);
      atomicExch(&last, number);
      atomicInc(&ring, 9);  // 0 to 9, then 0 again
    });
    CHECK(sum == 64);
    CHECK(tickets == std::vector<int>(64, 1));
    CHECK(real == 32.0f);
    CHECK(least == 3);
    CHECK(most == 63);
    CHECK(last < 64);
    CHECK(ring == 64 % 10);
  });
}

TEST_CASE("atomics: compare and swap makes one winner") {
  in_every_order([] {
    int owner = -1, winners = 0;
    run_grid({.blocks = 2, .threads = 32}, [&] {
      const int number = int(blockIdx.x * 32 + threadIdx.x);
      if (atomicCAS(&owner, -1, number) == -1) atomicAdd(&winners, 1);
    });
    CHECK(winners == 1);
    CHECK(owner >= 0);
  });
}

TEST_CASE("atomics: the last block to come sees what the others wrote") {
  in_every_order([] {
    std::vector<int> parts(5, 0);
    unsigned ticket = 0;
    int total = 0;
    run_grid({.blocks = 5, .threads = 32}, [&] {
      FSDC_SHARED(is_last, bool);
      if (threadIdx.x == 0) {
        parts[blockIdx.x] = int(blockIdx.x) + 1;
        __threadfence();
        is_last = atomicInc(&ticket, 4) == 4;
        __threadfence();
      }
      __syncthreads();
      if (is_last && threadIdx.x == 1) {
        for (const int part : parts) total += part;
      }
    });
    CHECK(total == 15);
    CHECK(ticket == 0);
  });
}

TEST_CASE("atomics: a block can wait for another that is resident too") {
  in_every_order([] {
    if (options().resident_clusters == 1) return;
    unsigned flag = 0;
    int data = 0, seen = 0;
    run_grid({.blocks = 2, .threads = 1}, [&] {
      if (blockIdx.x == 0) {
        data = 42;
        __threadfence();
        atomicExch(&flag, 1u);
      } else {
        while (atomicAdd(&flag, 0u) == 0) __nanosleep(10);
        __threadfence();
        seen = data;
      }
    });
    CHECK(seen == 42);
  });
}

TEST_CASE("atomics: a wait for a block that never comes is an error") {
  in_every_order([] {
    unsigned flag = 0;
    const std::string poll = line(2);
    const std::string error = error_of({.blocks = 2, .threads = 2}, [&] {
      while (blockIdx.x == 0 && atomicAdd(&flag, 0u) == 0) __nanosleep(10);
    });
    CHECK_THAT(error,
               ContainsSubstring("deadlock") &&
                   ContainsSubstring("block 0 threads 0 to 1 wait for another block, which does not come, at " + poll));
  });
}
