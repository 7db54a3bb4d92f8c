// SPDX-License-Identifier: Apache-2.0
// How CPU kernels use threads without knowing whose they are: csrc hands in LibTorch's, tests and benchmarks bring
// std::thread. Sums are split by shapes only, never by the number of threads, so that it cannot change a result.
#pragma once

#include <cstdint>
#include <functional>

namespace fsdc::cpu {

class Parallel {
 public:
  virtual ~Parallel() = default;

  // How many threads run() has at most, and so how many ranges it calls its body on.
  virtual int64_t threads() const = 0;

  // Calls body(begin, end) on ranges that cover [0, n) once, perhaps at the same time. Below `grain` items per
  // thread another thread is not worth waking. Bodies must not throw: they run behind a C interface.
  virtual void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const = 0;
};

// Everything on the calling thread.
class Sequential final : public Parallel {
 public:
  int64_t threads() const override { return 1; }
  void run(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) const override {
    if (n > 0) body(0, n);
  }
};

}  // namespace fsdc::cpu
