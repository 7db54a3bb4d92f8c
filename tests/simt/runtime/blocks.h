// SPDX-License-Identifier: Apache-2.0
// What the threads of a block, and of a cluster of blocks, share: barriers and memory.
#pragma once

#include <cstddef>

#include "thread.h"

namespace simt {

// The variable of this name in the running block; filled with 0xa5, since shared memory starts undefined.
void* shared_bytes(const void* key, size_t bytes, size_t alignment, Site site);

template <class T>
T& shared(const void* key, Site site = Site::current()) {
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_destructible_v<T>,
                "nobody constructs what lies in shared memory");
  return *static_cast<T*>(shared_bytes(key, sizeof(T), alignof(T), site));
}

// What launch() was asked for; null if that was nothing.
void* dynamic_shared();

// The same place in the shared memory of another block of the cluster.
void* map_shared(const void* address, unsigned rank, Site site);

unsigned cluster_rank();
unsigned cluster_size();
void cluster_barrier(Site site);
void block_barrier(Site site);

}  // namespace simt

// All threads of the block that have not exited must come, from the same place.
inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::block_barrier(site); }
