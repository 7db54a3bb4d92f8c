// SPDX-License-Identifier: Apache-2.0
// Thread block clusters: up to 8 blocks along x that run at the same time and read each other's shared memory. They
// exist from sm_90 on. Before, and wherever a kernel is launched without, a cluster is a block alone: its rank is 0,
// its barrier the block's.
//
// The memory of a block ends with it: after the last look into a peer there must be another cluster_sync().
#pragma once

#include "platform.cuh"

namespace fsdc::cuda {

#if !defined(__CUDACC__)

inline uint32_t cluster_rank() { return ::simt::cluster_rank(); }
inline uint32_t cluster_size() { return ::simt::cluster_size(); }

inline void cluster_sync(::simt::Site site = ::simt::Site::current()) { ::simt::cluster_barrier(site); }

inline void team_sync(uint32_t blocks, ::simt::Site site = ::simt::Site::current()) {
  return blocks > 1 ? ::simt::cluster_barrier(site) : ::simt::block_barrier(site);
}

template <class T>
T* cluster_map(T* shared, uint32_t rank, ::simt::Site site = ::simt::Site::current()) {
  return static_cast<T*>(::simt::map_shared(shared, rank, site));
}

#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The block's place in its cluster, and how many blocks that has.
__device__ inline uint32_t cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ inline uint32_t cluster_size() { return __clusterSizeInBlocks(); }

// Waits for all threads of the cluster; what any of them wrote before, all of them see after.
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// The same for a kernel that may have been launched without clusters: the barrier of a block is cheaper.
__device__ inline void team_sync(uint32_t blocks) {
  if (blocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

// Where block `rank` of the cluster has what this block has at `shared`.
template <class T>
__device__ T* cluster_map(T* shared, uint32_t rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}

#else

__device__ inline uint32_t cluster_rank() { return 0; }
__device__ inline uint32_t cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
__device__ inline void team_sync(uint32_t) { __syncthreads(); }

template <class T>
__device__ T* cluster_map(T* shared, uint32_t) {
  return shared;
}

#endif

}  // namespace fsdc::cuda
