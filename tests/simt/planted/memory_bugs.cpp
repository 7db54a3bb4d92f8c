// SPDX-License-Identifier: Apache-2.0
// Kernels with bugs that the address and undefined-behaviour checks must find. Each ends the program, so each is a run
// of its own: memory_bugs NAME. CMakeLists.txt says what has to be printed.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/cuda/cluster.cuh"

using namespace simt;
using fsdc::cuda::cluster_map;
using fsdc::cuda::cluster_sync;

namespace {

const std::map<std::string, std::function<void()>> kBugs = {
    {"static_shared",
     [] {
       run_grid({.blocks = 1, .threads = 32}, [] {
         FSDC_SHARED(values, int[31]);
         int* const first = values;
         first[threadIdx.x] = 1;
       });
     }},
    {"dynamic_shared",
     [] {
       run_grid({.blocks = 1, .threads = 32, .dynamic_shared_bytes = 31 * sizeof(int)}, [] {
         FSDC_DYNAMIC_SHARED(values, int);
         values[threadIdx.x] = 1;
       });
     }},
    {"peer_shared",
     [] {
       run_grid({.blocks = 2, .threads = 32, .cluster = 2}, [] {
         FSDC_SHARED(values, int[32]);
         cluster_sync();
         if (simt::cluster_rank() == 0) cluster_map(&values[0], 1)[threadIdx.x + 1] = 1;
         cluster_sync();
       });
     }},
    {"global",
     [] {
       std::vector<int> out(31);
       int* const first = out.data();
       run_grid({.blocks = 1, .threads = 32}, [first] { first[threadIdx.x] = 1; });
     }},
    {"exited_peer",
     [] {
       int seen = 0;
       run_grid({.blocks = 2, .threads = 1, .cluster = 2}, [&seen] {
         FSDC_SHARED(value, int);
         value = 1;
         cluster_sync();
         const int* const of_first = cluster_map(&value, 0);
         cluster_sync();
         if (simt::cluster_rank() == 1) seen = *of_first;
       });
       std::printf("%d\n", seen);
     }},
    {"alignment",
     [] {
       alignas(16) char bytes[32] = {};
       uint4 loaded{};
       run_grid({.blocks = 1, .threads = 1},
                [&] { loaded = __ldg(reinterpret_cast<const uint4*>(bytes + 4 * blockDim.x)); });
       std::printf("%u\n", loaded.x);
     }},
};

}  // namespace

int main(int count, char** arguments) {
  const auto bug = kBugs.find(count == 2 ? arguments[1] : "");
  if (bug == kBugs.end()) {
    std::fprintf(stderr, "memory_bugs: the argument must name a bug; got %s\n", count == 2 ? arguments[1] : "none");
    return 2;
  }
  bug->second();
  std::puts("not found");
  return 0;
}
