// SPDX-License-Identifier: Apache-2.0
// What the race checker wants to know. It stands in race.cpp and is linked into binaries of instrumented kernels only;
// in all others these calls do nothing.
#pragma once

#include <cstddef>
#include <span>

namespace simt::race {

// Threads are numbered through the whole grid.
using ThreadNumber = unsigned;

struct Checker {
  virtual ~Checker() = default;
  virtual void begin_grid(unsigned threads) = 0;
  virtual void end_grid() = 0;
  // From now on this thread runs; its own stack is nobody else's business.
  virtual void run(ThreadNumber thread, const void* stack, size_t stack_bytes) = 0;
  // These wait for each other: what any of them did happened before all that any of them will do.
  virtual void synchronize(std::span<const ThreadNumber> threads) = 0;
  virtual void fence() = 0;
  virtual void atomic(const void* address, size_t bytes) = 0;
  // Memory begins: what happened at its addresses before was about other memory.
  virtual void begin_memory(const void* address, size_t bytes) = 0;
  // Memory ends, after all that the running thread knows of: who reads it after that, or did before without a barrier,
  // loses a race.
  virtual void end_memory(const void* address, size_t bytes) = 0;
};

inline Checker* checker = nullptr;

inline void atomic(const void* address, size_t bytes) {
  if (checker != nullptr) checker->atomic(address, bytes);
}

}  // namespace simt::race
