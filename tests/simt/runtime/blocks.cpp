// SPDX-License-Identifier: Apache-2.0
// Barriers of blocks and clusters, and shared memory.
#include "blocks.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "atomics.h"
#include "state.h"

extern "C" void __asan_poison_memory_region(const volatile void* address, size_t bytes) __attribute__((weak));
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t bytes) __attribute__((weak));

namespace simt {
namespace {

constexpr unsigned kStaticSharedBytes = 48 << 10;  // more must be dynamic
constexpr int kUndefined = 0xa5;

bool is_same(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

template <class Visit>
void for_each_memory(Block& block, Visit visit) {
  if (block.dynamic.begin != nullptr) visit(block.dynamic);
  for (auto& [key, memory] : block.shared) visit(memory);
}

// All threads of `blocks` that have not exited are at the barrier: they go on.
void release(Barrier& barrier, Fiber::State state, std::span<const std::unique_ptr<Block>> blocks) {
  if (race::checker != nullptr) {
    std::vector<race::ThreadNumber> numbers;
    for (const auto& block : blocks) {
      for (const auto& thread : block->threads) numbers.push_back(thread->race_number);  // exited ones have arrived too
    }
    race::checker->synchronize(numbers);
  }
  barrier.waiting = 0;
  if (state == Fiber::State::kAtClusterBarrier) blocks[0]->cluster->all_have_started = true;
  for (const auto& block : blocks) {
    for (const auto& thread : block->threads) {
      if (thread->state == state) wake(*thread);
    }
  }
}

std::span<const std::unique_ptr<Block>> only(const Block& block) { return {&block.cluster->blocks[block.rank], 1}; }

void arrive(Barrier& barrier, unsigned alive, Fiber::State state, std::span<const std::unique_ptr<Block>> blocks,
            Site site) {
  if (is_removed(site)) return;
  if (barrier.waiting > 0 && !is_same(barrier.site, site)) {
    fail(site, "divergent barrier: %u other threads wait at %s:%u", barrier.waiting, barrier.site.file_name(),
         barrier.site.line());
  }
  barrier.site = site;
  if (++barrier.waiting == alive) {
    self().state = state;  // to be woken with the others
    self().waits_at = site;
    release(barrier, state, blocks);
    self().context->suspend();
  } else {
    wait(state, site);
  }
}

// The block has come to its end while others of the cluster may not have: its memory is gone.
void end_shared_memory(Block& block) {
  if (block.cluster->blocks.size() == 1) return;
  if (race::checker != nullptr) {
    std::vector<race::ThreadNumber> numbers;
    for (const auto& thread : block.threads) numbers.push_back(thread->race_number);
    race::checker->synchronize(numbers);
  }
  for_each_memory(block, [](const Memory& memory) {
    if (race::checker != nullptr) race::checker->end_memory(memory.begin, memory.bytes);
    std::memset(memory.begin, kUndefined, memory.bytes);
    if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(memory.begin, memory.bytes);
  });
}

}  // namespace

// Heap blocks of exact size, so that AddressSanitizer sees the first byte beyond.
Memory new_shared_memory(size_t bytes, size_t alignment) {
  void* address = nullptr;
  if (posix_memalign(&address, alignment < 16 ? 16 : alignment, bytes) != 0) throw std::bad_alloc();
  std::memset(address, kUndefined, bytes);
  if (race::checker != nullptr) race::checker->begin_memory(address, bytes);
  return {static_cast<char*>(address), bytes};
}

Block::~Block() {
  for_each_memory(*this, [](const Memory& memory) {
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory.begin, memory.bytes);
    std::free(memory.begin);
  });
}

void thread_exited(Fiber& fiber) {
  fiber.state = Fiber::State::kExited;
  Block& block = *fiber.block;
  Cluster& cluster = *block.cluster;
  block.warps[fiber.warp()].exited |= 1u << fiber.lane();
  --block.alive;
  --cluster.alive;
  if (block.alive == 0) end_shared_memory(block);
  if (block.alive > 0 && block.barrier.waiting == block.alive) {
    release(block.barrier, Fiber::State::kAtBlockBarrier, only(block));
  }
  if (cluster.alive > 0 && cluster.barrier.waiting == cluster.alive) {
    release(cluster.barrier, Fiber::State::kAtClusterBarrier, cluster.blocks);
  }
}

void block_barrier(Site site) {
  Block& block = *self().block;
  arrive(block.barrier, block.alive, Fiber::State::kAtBlockBarrier, only(block), site);
}

void cluster_barrier(Site site) {
  Cluster& cluster = *self().block->cluster;
  arrive(cluster.barrier, cluster.alive, Fiber::State::kAtClusterBarrier, cluster.blocks, site);
}

unsigned cluster_rank() { return self().block->rank; }

unsigned cluster_size() { return static_cast<unsigned>(self().block->cluster->blocks.size()); }

void* shared_bytes(const void* key, size_t bytes, size_t alignment, Site site) {
  Block& block = *self().block;
  Memory& memory = block.shared[key];
  if (memory.begin == nullptr) {
    memory = new_shared_memory(bytes, alignment);
    size_t all = 0;
    for (const auto& [other_key, other] : block.shared) all += other.bytes;
    if (all > kStaticSharedBytes) fail(site, "%zu bytes of static shared memory, more than 48 KiB,", all);
    all += block.dynamic.bytes;
    if (all > options().shared_bytes) fail(site, "%zu bytes of shared memory, more than the device has,", all);
  }
  return memory.begin;
}

void* dynamic_shared() { return self().block->dynamic.begin; }

void* map_shared(const void* address, unsigned rank, Site site) {
  Block& block = *self().block;
  if (rank >= cluster_size()) fail(site, "rank %u in a cluster of %u", rank, cluster_size());
  Block& peer = *block.cluster->blocks[rank];
  if (&peer != &block && !block.cluster->all_have_started) {  // on a GPU it may not run yet, and has no memory then
    fail(site, "the block of rank %u may not have started: no barrier of the cluster came before", rank);
  }
  if (peer.alive == 0) fail(site, "the block of rank %u has exited: its shared memory is gone", rank);
  const char* const byte = static_cast<const char*>(address);
  const auto is_in = [byte](const Memory& memory) {
    return byte >= memory.begin && byte < memory.begin + memory.bytes;
  };
  if (is_in(block.dynamic)) return peer.dynamic.begin + (byte - block.dynamic.begin);
  for (const auto& [key, memory] : block.shared) {
    if (!is_in(memory)) continue;
    Memory& of_peer = peer.shared[key];
    if (of_peer.begin == nullptr) of_peer = new_shared_memory(memory.bytes, 128);  // it has not come there yet
    return of_peer.begin + (byte - memory.begin);
  }
  fail(site, "this address is not in the shared memory of the calling block");
}

void fence(Site site) {
  if (!is_removed(site) && race::checker != nullptr) race::checker->fence();
}

}  // namespace simt
