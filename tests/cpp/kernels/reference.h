// SPDX-License-Identifier: Apache-2.0
// The kernels once more, slow and obvious, from the standard library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fsdc::test {

// 0 for -inf, 1 for finite, 2 for NaN, 3 for +inf.
inline int class_of(float score) {
  if (std::isnan(score)) return 2;
  return std::isinf(score) ? (score > 0 ? 3 : 0) : 1;
}

inline bool stays_before(float a, float b) {
  if (class_of(a) != class_of(b)) return class_of(a) > class_of(b);
  return class_of(a) == 1 && a > b;
}

// The `kept` best, ascending; of equal ones the later.
inline std::vector<int64_t> select(const std::vector<float>& scores, int64_t kept) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.rbegin(), order.rend(), 0);  // newest first
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return stays_before(scores[a], scores[b]); });
  order.resize(kept);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace fsdc::test
