// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "kernels/cpu/parallel.h"

namespace fsdc::test {

// Splits the items evenly among new threads, whatever the grain: every split must give the same result.
class Threads final : public cpu::Parallel {
 public:
  explicit Threads(int count) : count_(count) {}

  int64_t threads() const override { return count_; }

  void run(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) const override {
    const int64_t piece = (n + count_ - 1) / count_;
    std::vector<std::thread> threads;
    for (int64_t begin = 0; begin < n; begin += piece) {
      threads.emplace_back([&body, begin, end = std::min(n, begin + piece)] { body(begin, end); });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int64_t count_;
};

}  // namespace fsdc::test
