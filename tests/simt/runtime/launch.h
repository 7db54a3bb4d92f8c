// SPDX-License-Identifier: Apache-2.0
// Starting a grid, and in which order its threads take turns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include "thread.h"

namespace simt {

// What a kernel did wrong; says what, file, line, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which of the threads that can run does so next. Each runs until it waits for others, or ends.
enum class Order { kSequential, kReverse, kRandom };

// A barrier or fence in the source of a kernel.
struct SyncSite {
  std::string file;
  unsigned line;
  auto operator<=>(const SyncSite&) const = default;
};

// Of all launches from now on.
struct Options {
  Order order = Order::kSequential;
  uint64_t seed = 1;                  // of the random order
  unsigned resident_clusters = 1;     // alive at the same time; a block alone is a cluster of one
  unsigned shared_bytes = 227 << 10;  // the most that a block may have, static and dynamic together
  unsigned largest_cluster = 8;       // blocks that fit side by side
  std::optional<SyncSite> removed;    // this one does nothing: a test that passes all the same proves too little
};
Options& options();

// Every barrier and fence that launches have come across so far.
std::set<SyncSite> sync_sites();

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that share their memory
};

// Runs body() once per thread; returns when all have ended, throws Error.
void run_grid(const Grid& grid, const std::function<void()>& body);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  run_grid(grid, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace simt
