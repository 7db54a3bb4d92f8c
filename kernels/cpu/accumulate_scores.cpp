// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels/cpu/cpu.h"

namespace fsdc::cpu {

void accumulate_scores(const AccumulateScoresParams& params, const Parallel& parallel, const KernelTable& kernels) {
  constexpr int64_t kColumnsPerItem = 512;
  constexpr int64_t kWeightsPerThread = 1 << 14;  // below this another thread costs more than it brings
  const int64_t items_per_row = (params.tokens + kColumnsPerItem - 1) / kColumnsPerItem;
  const int64_t weights_per_item = kColumnsPerItem * (1 + params.group * params.queries);
  parallel.run(params.batch * params.heads * items_per_row, std::max<int64_t>(1, kWeightsPerThread / weights_per_item),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t first = item % items_per_row * kColumnsPerItem;
                   kernels.accumulate_columns(params, item / items_per_row, first,
                                              std::min(params.tokens, first + kColumnsPerItem));
                 }
               });
}

}  // namespace fsdc::cpu
