// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/cpu/parallel.h"

namespace fsdc::bench {

// As many threads as the machine has, kept waiting between calls so that starting them is not timed.
class ThreadPool final : public cpu::Parallel {
 public:
  ThreadPool() {
    for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
      workers_.emplace_back([this, i] { work(i); });
    }
  }

  ~ThreadPool() override {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int64_t threads() const override { return int64_t(workers_.size()) + 1; }

  void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const override {
    if (n <= 0) return;
    const int64_t pieces = std::min<int64_t>(int64_t(workers_.size()) + 1, (n + grain - 1) / grain);
    {
      const std::lock_guard lock(mutex_);
      body_ = &body, n_ = n, piece_ = (n + pieces - 1) / pieces;
      waiting_for_ = workers_.size();
      ++round_;
    }
    start_.notify_all();
    body(0, std::min(n, piece_));
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return waiting_for_ == 0; });
  }

 private:
  void work(int64_t index) {
    for (int64_t seen = 0;;) {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stopped_ || round_ != seen; });
      if (stopped_) return;
      seen = round_;
      const int64_t begin = std::min(n_, index * piece_), end = std::min(n_, begin + piece_);
      lock.unlock();
      if (begin < end) (*body_)(begin, end);
      lock.lock();
      if (--waiting_for_ == 0) done_.notify_one();
    }
  }

  mutable std::mutex mutex_;
  mutable std::condition_variable start_, done_;
  mutable const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  mutable int64_t n_ = 0, piece_ = 0, round_ = 0;
  mutable size_t waiting_for_ = 0;
  bool stopped_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace fsdc::bench
