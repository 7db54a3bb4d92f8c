// SPDX-License-Identifier: Apache-2.0
// Which thread runs next, and what happens when none can.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <random>

#include "state.h"

namespace simt {
namespace {

// One launch at a time.
struct Scheduler {
  const Grid* grid = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<Fiber*> woken;   // since the last one ran; not in the queue yet
  std::deque<Fiber*> can_run;  // first come, first served: those who poll hold up nobody
  unsigned polls = 0;          // in a row, of whoever, with nothing else in between
  std::mt19937_64 random;
  std::string error;
};
Scheduler scheduler;

constexpr unsigned kMostPolls = 1 << 18;  // a second or so

uint3 coordinates(unsigned number, dim3 sizes) {
  return {number % sizes.x, number / sizes.x % sizes.y, number / sizes.x / sizes.y};
}

void run_thread(void* argument) {
  (*scheduler.body)();
  thread_exited(*static_cast<Fiber*>(argument));
}

void add_block(Cluster& cluster, unsigned number) {
  const Grid& grid = *scheduler.grid;
  Block& block = *cluster.blocks.emplace_back(std::make_unique<Block>());
  block.cluster = &cluster;
  block.rank = number % grid.cluster;
  block.number = number;
  block.alive = grid.threads.x * grid.threads.y * grid.threads.z;
  block.warps.resize((block.alive + 31) / 32);
  cluster.alive += block.alive;
  if (grid.dynamic_shared_bytes > 0) block.dynamic = new_shared_memory(grid.dynamic_shared_bytes, 128);
  for (unsigned i = 0; i < block.alive; ++i) {
    Fiber& fiber = *block.threads.emplace_back(std::make_unique<Fiber>());
    fiber.thread_index = coordinates(i, grid.threads);
    fiber.block_index = coordinates(number, grid.blocks);
    fiber.block_size = grid.threads;
    fiber.grid_size = grid.blocks;
    fiber.number = i;
    fiber.block = &block;
    fiber.race_number = number * block.alive + i;
    fiber.context = std::make_unique<Context>(&run_thread, &fiber);
    if (race::checker != nullptr) race::checker->begin_memory(&fiber, sizeof fiber);  // kernels read it, as threadIdx
    scheduler.woken.push_back(&fiber);
  }
}

void queue_woken() {
  std::vector<Fiber*>& woken = scheduler.woken;
  if (options().order == Order::kReverse) std::reverse(woken.begin(), woken.end());
  scheduler.can_run.insert(scheduler.can_run.end(), woken.begin(), woken.end());
  woken.clear();
}

Fiber& next_fiber() {
  std::deque<Fiber*>& can_run = scheduler.can_run;
  if (options().order == Order::kRandom) std::swap(can_run.front(), can_run[scheduler.random() % can_run.size()]);
  Fiber& fiber = *can_run.front();
  can_run.pop_front();
  return fiber;
}

const char* describe(Fiber::State state) {
  switch (state) {
    case Fiber::State::kAtBlockBarrier:
      return "wait at the block's barrier";
    case Fiber::State::kAtClusterBarrier:
      return "wait at the cluster's barrier";
    case Fiber::State::kInExchange:
      return "wait for lanes of their warp";
    case Fiber::State::kPolls:
      return "wait for another block, which does not come,";
    case Fiber::State::kExited:
      return "have exited";
    case Fiber::State::kCanRun:
      break;
  }
  return "can run";
}

// Nobody gets on, yet not all have exited: where everybody is.
std::string describe_deadlock() {
  std::string text = "simt: deadlock:";
  for (const auto& cluster : scheduler.resident) {
    for (const auto& block : cluster->blocks) {
      for (size_t first = 0, end; first < block->threads.size(); first = end) {
        const Fiber& fiber = *block->threads[first];
        const auto is_elsewhere = [&](const auto& other) {
          return other->state != fiber.state || other->waits_at.line() != fiber.waits_at.line();
        };
        const auto begin = block->threads.begin();
        end = static_cast<size_t>(std::find_if(begin + static_cast<long>(first), block->threads.end(), is_elsewhere) -
                                  begin);
        text += " block " + std::to_string(block->number) + " threads " + std::to_string(first) + " to " +
                std::to_string(end - 1) + " " + describe(fiber.state);
        if (fiber.state != Fiber::State::kExited) {
          text += " at " + std::string(fiber.waits_at.file_name()) + ":" + std::to_string(fiber.waits_at.line());
        }
        text += ";";
      }
    }
  }
  return text;
}

void check(const Grid& grid) {
  const dim3 blocks = grid.blocks, threads = grid.threads;
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw Error(std::string("simt: a launch must have ") + rule);
  };
  const uint64_t per_block = uint64_t{threads.x} * threads.y * threads.z;
  require(blocks.x >= 1 && blocks.y >= 1 && blocks.z >= 1 && blocks.y <= 65535 && blocks.z <= 65535,
          "1 block or more, at most 65535 along y and z");
  require(per_block >= 1 && per_block <= 1024 && threads.z <= 64, "1 to 1024 threads per block");
  require(grid.dynamic_shared_bytes <= options().shared_bytes, "no more dynamic shared memory than the device");
  require(grid.cluster == 1 || grid.cluster == 2 || grid.cluster == 4 || grid.cluster == 8,
          "clusters of 1, 2, 4 or 8 blocks");
  require(grid.cluster <= options().largest_cluster, "no larger clusters than fit on the device");
  require(blocks.x % grid.cluster == 0, "whole clusters along x");
}

void run_all(const Grid& grid) {
  const unsigned clusters = grid.blocks.x / grid.cluster * grid.blocks.y * grid.blocks.z;
  std::vector<unsigned> waiting(clusters);  // the next one last
  for (unsigned i = 0; i < clusters; ++i) waiting[i] = clusters - 1 - i;
  if (options().order == Order::kReverse) std::reverse(waiting.begin(), waiting.end());
  if (options().order == Order::kRandom) std::shuffle(waiting.begin(), waiting.end(), scheduler.random);

  while (scheduler.error.empty()) {
    std::erase_if(scheduler.resident, [](const auto& cluster) { return cluster->alive == 0; });
    while (scheduler.resident.size() < options().resident_clusters && !waiting.empty()) {
      Cluster& cluster = *scheduler.resident.emplace_back(std::make_unique<Cluster>());
      for (unsigned i = 0; i < grid.cluster; ++i) add_block(cluster, waiting.back() * grid.cluster + i);
      waiting.pop_back();
      queue_woken();
    }
    if (scheduler.resident.empty()) return;
    if (scheduler.can_run.empty() || scheduler.polls > kMostPolls) {
      scheduler.error = describe_deadlock();
      return;
    }
    Fiber& fiber = next_fiber();
    running = &fiber;
    fiber.state = Fiber::State::kCanRun;
    if (race::checker != nullptr) race::checker->run(fiber.race_number, fiber.context->stack(), Context::kStackBytes);
    fiber.context->resume();
    running = nullptr;
    scheduler.polls = fiber.state == Fiber::State::kPolls ? scheduler.polls + 1 : 0;
    queue_woken();
  }
}

}  // namespace

Fiber& self() { return const_cast<Fiber&>(static_cast<const Fiber&>(*running)); }

void wait(Fiber::State state, Site site) {
  self().state = state;
  self().waits_at = site;
  self().context->suspend();
}

void wake(Fiber& fiber) {
  fiber.state = Fiber::State::kCanRun;
  scheduler.woken.push_back(&fiber);
}

void poll(Site site) {
  wake(self());
  wait(Fiber::State::kPolls, site);
}

void fail(Site site, const char* format, ...) {
  char what[600];  // nothing here may need a destructor
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  const uint3 block = running->block_index, thread = running->thread_index;
  char place[600] = "", text[1400];
  if (site.line() != 0) std::snprintf(place, sizeof place, " at %s:%u", site.file_name(), site.line());
  std::snprintf(text, sizeof text, "simt: %s%s, block (%u, %u, %u), thread (%u, %u, %u)", what, place, block.x, block.y,
                block.z, thread.x, thread.y, thread.z);
  scheduler.error = text;
  self().context->suspend();
  __builtin_unreachable();  // run_all ends at the first error
}

void run_grid(const Grid& grid, const std::function<void()>& body) {
  check(grid);
  scheduler.grid = &grid;
  scheduler.body = &body;
  scheduler.random.seed(options().seed);
  scheduler.error.clear();
  scheduler.polls = 0;
  const unsigned per_block = grid.threads.x * grid.threads.y * grid.threads.z;
  if (race::checker != nullptr) {
    race::checker->begin_grid(grid.blocks.x * grid.blocks.y * grid.blocks.z * per_block);
  }
  run_all(grid);
  if (race::checker != nullptr) race::checker->end_grid();
  scheduler.woken.clear();
  scheduler.can_run.clear();
  scheduler.resident.clear();
  if (!scheduler.error.empty()) throw Error(scheduler.error);
}

}  // namespace simt
