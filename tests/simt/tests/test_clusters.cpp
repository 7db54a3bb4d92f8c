// SPDX-License-Identifier: Apache-2.0
// Clusters of blocks: ranks, barriers, each other's shared memory.
#include <vector>

#include "errors.h"
#include "kernels/cuda/cluster.cuh"

using namespace simt;
using fsdc::cuda::cluster_map;
using fsdc::cuda::cluster_sync;

TEST_CASE("clusters: ranks follow each other along x") {
  in_every_order([] {
    for (const unsigned size : {1u, 2u, 4u, 8u}) {
      std::vector<unsigned> ranks(2 * 8 * 3, 99), sizes(2 * 8 * 3, 99);
      run_grid({.blocks = dim3(2 * 8, 3), .threads = 1, .cluster = size}, [&] {
        ranks[blockIdx.y * 16 + blockIdx.x] = fsdc::cuda::cluster_rank();
        sizes[blockIdx.y * 16 + blockIdx.x] = fsdc::cuda::cluster_size();
      });
      for (unsigned i = 0; i < ranks.size(); ++i) CHECK(ranks[i] == i % size);
      CHECK(sizes == std::vector<unsigned>(sizes.size(), size));
    }
  });
}

TEST_CASE("clusters: peers read and write each other's static and dynamic memory") {
  in_every_order([] {
    for (const unsigned size : {1u, 2u, 4u, 8u}) {
      std::vector<unsigned> seen(16 * 32, 0);
      run_grid({.blocks = 16, .threads = 32, .dynamic_shared_bytes = 32 * 4, .cluster = size}, [&] {
        FSDC_SHARED(written, unsigned[32]);
        FSDC_DYNAMIC_SHARED(own, unsigned);
        const unsigned next = (cluster_rank() + 1) % size;
        own[threadIdx.x] = blockIdx.x * 100 + threadIdx.x;
        cluster_sync();
        cluster_map(written, next)[31 - threadIdx.x] = cluster_map(own, next)[threadIdx.x];
        cluster_sync();
        seen[blockIdx.x * 32 + threadIdx.x] = written[threadIdx.x];
      });
      for (unsigned i = 0; i < 16 * 32; ++i) CHECK(seen[i] == i / 32 * 100 + 31 - i % 32);
    }
  });
}

TEST_CASE("clusters: a barrier waits for every block, but not for those that have exited") {
  in_every_order([] {
    std::vector<int> came(3, 0);
    int all_came = 1;
    run_grid({.blocks = 12, .threads = 20, .cluster = 4}, [&] {
      if (cluster_rank() == 2) return;
      atomicAdd(&came[blockIdx.x / 4], 1);
      cluster_sync();
      atomicMin(&all_came, int(came[blockIdx.x / 4] == 60));
    });
    CHECK(all_came == 1);
  });
}

TEST_CASE("clusters: misuse is an error") {
  in_every_order([] {
    const std::string early = line(3);
    const std::string too_early = error_of({.blocks = 2, .threads = 32, .cluster = 2}, [] {
      FSDC_SHARED(value, int);
      *cluster_map(&value, 1 - cluster_rank()) = 1;
      cluster_sync();
    });
    CHECK_THAT(too_early, ContainsSubstring("may not have started") && ContainsSubstring(early));

    const std::string rank = line(4);
    const std::string out_of_range = error_of({.blocks = 4, .threads = 32, .cluster = 4}, [] {
      FSDC_SHARED(value, int);
      cluster_sync();
      *cluster_map(&value, cluster_rank() + 1) = 1;
      cluster_sync();
    });
    const bool is_named = out_of_range.find("rank 4 in a cluster of 4 at " + rank) != out_of_range.npos ||
                          out_of_range.find("race") != out_of_range.npos;
    CAPTURE(out_of_range);
    CHECK(is_named);

    const std::string not_shared = error_of({.blocks = 2, .threads = 1, .cluster = 2}, [] {
      int local = 0;
      cluster_map(&local, cluster_rank());
    });
    CHECK_THAT(not_shared, ContainsSubstring("not in the shared memory of the calling block"));

    const std::string one = line(3), other = line(5);
    const std::string divergent = error_of({.blocks = 2, .threads = 32, .cluster = 2}, [] {
      if (cluster_rank() == 0) {
        cluster_sync();
      } else {
        cluster_sync();
      }
    });
    CHECK_THAT(divergent, ContainsSubstring("divergent barrier") && ContainsSubstring(one) && ContainsSubstring(other));

    const std::string forgotten = error_of({.blocks = 2, .threads = 2, .cluster = 2}, [] {
      if (cluster_rank() == 0) cluster_sync();
      if (threadIdx.x == 0) __syncthreads();
      if (threadIdx.x == 1) cluster_sync();
    });
    CHECK_THAT(forgotten, ContainsSubstring("divergent barrier") || ContainsSubstring("deadlock"));
  });
}

TEST_CASE("clusters: the memory of a block that has exited is gone") {
  const KeepOptions keep;
  int seen = 0;
  const std::string mapped_late = line(6);
  const std::string late = error_of({.blocks = 2, .threads = 1, .cluster = 2}, [&] {
    FSDC_SHARED(value, int);
    value = 5;
    cluster_sync();
    if (cluster_rank() == 0) return;
    seen = *cluster_map(&value, 0);
  });
  CHECK_THAT(late, ContainsSubstring("rank 0 has exited") && ContainsSubstring(mapped_late));

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // these end it before
  run_grid({.blocks = 2, .threads = 1, .cluster = 2}, [&] {
    FSDC_SHARED(value, int);
    value = 5;
    cluster_sync();
    const int* const mapped_early = cluster_map(&value, 0);
    cluster_sync();
    if (cluster_rank() == 0) return;
    seen = *mapped_early;
  });
  CHECK(seen == int(0xa5a5a5a5u));
#endif
}
