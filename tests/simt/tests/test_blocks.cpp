// SPDX-License-Identifier: Apache-2.0
// Barriers of a block, and its shared memory.
#include <vector>

#include "errors.h"

using namespace simt;

TEST_CASE("blocks: a barrier is passed when all have come") {
  in_every_order([] {
    std::vector<int> before(2, 0);
    int all_came = 1;
    run_grid({.blocks = 2, .threads = 50}, [&] {
      for (int round = 1; round <= 3; ++round) {
        atomicAdd(&before[blockIdx.x], 1);
        __syncthreads();
        atomicMin(&all_came, int(before[blockIdx.x] == 50 * round));
        __syncthreads();
      }
    });
    CHECK(all_came == 1);
  });
}

TEST_CASE("blocks: threads that have exited are not waited for") {
  in_every_order([] {
    int passed = 0;
    run_grid({.blocks = 1, .threads = 40}, [&] {
      if (threadIdx.x >= 25) return;
      __syncthreads();
      atomicAdd(&passed, 1);
    });
    CHECK(passed == 25);
  });
}

TEST_CASE("blocks: a divergent barrier is an error") {
  in_every_order([] {
    const std::string one = line(3), other = line(5);
    const std::string error = error_of({.blocks = 1, .threads = 64}, [] {
      if (threadIdx.x < 10) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    });
    CHECK_THAT(error, ContainsSubstring("divergent barrier") && ContainsSubstring(one) && ContainsSubstring(other) &&
                          ContainsSubstring("block (0, 0, 0), thread ("));
  });
}

TEST_CASE("blocks: a deadlock names who waits where") {
  in_every_order([] {
    const std::string lane = line(2), barrier = line(3);
    const std::string error = error_of({.blocks = 1, .threads = 64}, [] {
      if (threadIdx.x == 40) __syncwarp();
      __syncthreads();
    });
    CHECK_THAT(error, ContainsSubstring("deadlock") &&
                          ContainsSubstring("block 0 threads 0 to 39 wait at the block's barrier at " + barrier) &&
                          ContainsSubstring("threads 40 to 40 wait for lanes of their warp at " + lane) &&
                          ContainsSubstring("threads 41 to 63 wait at the block's barrier"));
  });
}

TEST_CASE("blocks: static shared memory is one per block and variable, and starts undefined") {
  in_every_order([] {
    std::vector<unsigned> seen(3 * 32, 0), other(3 * 32, 0);
    int starts_undefined = 1;
    run_grid({.blocks = 3, .threads = 32}, [&] {
      FSDC_SHARED(values, unsigned[32]);
      FSDC_SHARED(others, unsigned[32]);
      atomicMin(&starts_undefined, int(values[threadIdx.x] == 0xa5a5a5a5u));
      values[threadIdx.x] = blockIdx.x * 32 + threadIdx.x;
      others[threadIdx.x] = 1000;
      __syncthreads();
      seen[blockIdx.x * 32 + threadIdx.x] = values[31 - threadIdx.x];
      other[blockIdx.x * 32 + threadIdx.x] = others[31 - threadIdx.x];
    });
    CHECK(starts_undefined == 1);
    for (unsigned i = 0; i < 3 * 32; ++i) {
      CHECK(seen[i] == i / 32 * 32 + 31 - i % 32);
      CHECK(other[i] == 1000);
    }
  });
}

namespace {
template <int kVariant>
void write_variant(int* out) {
  FSDC_SHARED(value, int);
  if (threadIdx.x == 0) value = kVariant;
  __syncthreads();
  out[threadIdx.x] = value;
}
}  // namespace

TEST_CASE("blocks: templates have shared variables of their own") {
  std::vector<int> one(4), two(4);
  run_grid({.blocks = 1, .threads = 4}, [&] {
    write_variant<1>(one.data());
    write_variant<2>(two.data());
    __syncthreads();
    write_variant<1>(one.data());
  });
  CHECK(one == std::vector<int>(4, 1));
  CHECK(two == std::vector<int>(4, 2));
}

TEST_CASE("blocks: dynamic shared memory") {
  in_every_order([] {
    std::vector<int> seen(2 * 32, -1);
    run_grid({.blocks = 2, .threads = 32, .dynamic_shared_bytes = 32 * sizeof(int)}, [&] {
      FSDC_DYNAMIC_SHARED(values, int);
      values[threadIdx.x] = int(blockIdx.x * 32 + threadIdx.x);
      __syncthreads();
      seen[blockIdx.x * 32 + threadIdx.x] = values[31 - threadIdx.x];
    });
    for (int i = 0; i < 2 * 32; ++i) CHECK(seen[size_t(i)] == i / 32 * 32 + 31 - i % 32);
  });
}

TEST_CASE("blocks: more shared memory than there is is an error") {
  const KeepOptions keep;
  const std::string first = line(2);
  const std::string too_static = error_of({.blocks = 1, .threads = 1}, [] {
    FSDC_SHARED(large, char[(48 << 10) + 1]);
    large[0] = 1;
  });
  CHECK_THAT(too_static, ContainsSubstring("more than 48 KiB") && ContainsSubstring(first));
  options().shared_bytes = 1000;
  const std::string second = line(2);
  const std::string too_much = error_of({.blocks = 1, .threads = 1, .dynamic_shared_bytes = 900}, [] {
    FSDC_SHARED(small, char[200]);
    small[0] = 1;
  });
  CHECK_THAT(too_much, ContainsSubstring("more than the device has") && ContainsSubstring(second));
}

TEST_CASE("blocks: a barrier can be taken away by name") {
  const KeepOptions keep;
  int passed_early = 0;
  const unsigned barrier_line = __LINE__ + 6;
  const auto kernel = [&] {
    FSDC_SHARED(count, int);
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    __syncthreads();
    if (count < 8) atomicAdd(&passed_early, 1);
  };
  run_grid({.blocks = 1, .threads = 8}, kernel);
  CHECK(passed_early == 0);
  CHECK(sync_sites().contains(SyncSite{__FILE__, barrier_line}));
  options().removed = SyncSite{__FILE__, barrier_line};
#if !defined(__SANITIZE_THREAD__)  // the race checker would end it
  run_grid({.blocks = 1, .threads = 8}, kernel);
  CHECK(passed_early == 7);
#else
  CHECK_THAT(error_of({.blocks = 1, .threads = 8}, kernel), ContainsSubstring("race"));
#endif
}
