// SPDX-License-Identifier: Apache-2.0
// The CPU as a device: its memory, and in which order threads run. The kernels are compiled in NAME_simt.cpp, with blocks
// small enough to run quickly, and as they ship.
#include "device_simt.h"

#include <cstdlib>
#include <cstring>

namespace fsdc::test {

static bool shipped_blocks = false;

bool has_shipped_blocks() { return shipped_blocks; }

// malloc: AddressSanitizer sees the first byte beyond.
DeviceMemory::DeviceMemory(const Bytes& bytes)
    : data_(static_cast<char*>(std::malloc(bytes.size()))), bytes_(bytes.size()) {
  if (bytes_ > 0) std::memcpy(data_, bytes.data(), bytes_);
}
DeviceMemory::~DeviceMemory() { std::free(data_); }
Bytes DeviceMemory::copy() const { return {data_, data_ + bytes_}; }

bool is_fast() {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  return false;
#else
  return true;
#endif
}

// The race checker hardly minds in which order threads come, and each order costs as much again; blocks as they ship cost
// it minutes.
#if defined(__SANITIZE_THREAD__)
int orders() { return 1; }
int all_orders() { return 1; }
#else
int orders() { return 4; }
int all_orders() { return 5; }
#endif

void use_order(int order) {
  constexpr simt::Order kOrders[] = {simt::Order::kSequential, simt::Order::kReverse, simt::Order::kRandom,
                                     simt::Order::kRandom, simt::Order::kSequential};
  simt::options().order = kOrders[order];
  simt::options().seed = static_cast<uint64_t>(order);
  simt::options().resident_clusters = order < 2 || order == 4 ? 1 : 3;
  simt::options().largest_cluster = 8;
  shipped_blocks = order == 4;
}

bool limit_clusters(uint32_t blocks) {
  simt::options().largest_cluster = blocks;
  return true;
}

}  // namespace fsdc::test
