// SPDX-License-Identifier: Apache-2.0
// The grid that runs: clusters of blocks of threads, and who waits where. Known to the runtime only.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "blocks.h"
#include "context.h"
#include "launch.h"
#include "race.h"
#include "warps.h"

namespace simt {

struct Block;

struct Fiber : Thread {
  enum class State { kCanRun, kAtBlockBarrier, kAtClusterBarrier, kInExchange, kPolls, kExited };

  Block* block = nullptr;
  race::ThreadNumber race_number = 0;
  State state = State::kCanRun;
  Site waits_at{};
  uint64_t operand = 0;  // that it brought to the exchange it waits in
  Exchange exchange{};
  std::unique_ptr<Context> context;
};

// Of a block or a cluster.
struct Barrier {
  unsigned waiting = 0;
  Site site{};  // where those who wait came from
};

// Lanes of a warp that wait for each other. Others may meet elsewhere at the same time.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  Site site;
};
struct Warp {
  std::vector<Meeting> meetings;
  unsigned exited = 0;  // lanes
};

struct Memory {
  char* begin = nullptr;
  size_t bytes = 0;
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in its cluster
  unsigned number = 0;
  std::vector<std::unique_ptr<Fiber>> threads;
  std::vector<Warp> warps;
  unsigned alive = 0;
  Barrier barrier;
  std::map<const void*, Memory> shared;
  Memory dynamic;

  ~Block();
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned alive = 0;
  Barrier barrier;
  bool all_have_started = false;  // known from the first barrier on
};

// The running thread, and back to the scheduler until it can run again.
Fiber& self();
void wait(Fiber::State state, Site site);
void wake(Fiber& fiber);

// True where the options say that this barrier or fence does nothing.
bool is_removed(Site site);

Memory new_shared_memory(size_t bytes, size_t alignment);

// A thread of this block exited, perhaps the last one.
void thread_exited(Fiber& fiber);

}  // namespace simt
