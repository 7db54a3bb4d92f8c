// SPDX-License-Identifier: Apache-2.0
// Running a test in several orders of threads and blocks. What a kernel may not depend on is tried both ways.
#pragma once

#include "simt.h"

namespace simt {

// Puts the options back at the end of a scope.
class KeepOptions {
 public:
  KeepOptions() : before_(options()) {}
  ~KeepOptions() { options() = before_; }
  KeepOptions(const KeepOptions&) = delete;
  KeepOptions& operator=(const KeepOptions&) = delete;

 private:
  Options before_;
};

template <class Test>
void in_every_order(Test test) {
  const KeepOptions keep;
  for (const unsigned resident : {1, 3}) {
    options().resident_clusters = resident;
    for (const Order order : {Order::kSequential, Order::kReverse}) {
      options().order = order;
      test();
    }
    options().order = Order::kRandom;
    for (options().seed = 1; options().seed <= 3; ++options().seed) test();
  }
}

}  // namespace simt
