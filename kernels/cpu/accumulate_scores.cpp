// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/accumulate_scores.h"

#include <algorithm>

#include "kernels/cpu/cpu.h"

namespace fsdc::cpu {

namespace portable {
extern const AccumulateScoresLoops kAccumulateScoresLoops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AccumulateScoresLoops kAccumulateScoresLoops;
}
namespace avx512 {
extern const AccumulateScoresLoops kAccumulateScoresLoops;
}
#endif

const AccumulateScoresLoops& accumulate_scores_loops([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512::kAccumulateScoresLoops;
  if (isa >= Isa::kAvx2) return avx2::kAccumulateScoresLoops;
#endif
  return portable::kAccumulateScoresLoops;
}

void accumulate_scores(const AccumulateScoresParams& params, const Parallel& parallel, Isa isa) {
  const AccumulateScoresLoops& loops = accumulate_scores_loops(isa);
  constexpr int64_t kColumnsPerItem = 512;
  constexpr int64_t kWeightsPerThread = 1 << 14;  // below this another thread costs more than it brings
  const int64_t items_per_row = (params.tokens + kColumnsPerItem - 1) / kColumnsPerItem;
  const int64_t weights_per_item = kColumnsPerItem * (1 + params.group * params.queries);
  parallel.run(params.batch * params.heads * items_per_row, std::max<int64_t>(1, kWeightsPerThread / weights_per_item),
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t first = item % items_per_row * kColumnsPerItem;
                   loops.accumulate_columns(params, item / items_per_row, first,
                                            std::min(params.tokens, first + kColumnsPerItem));
                 }
               });
}

}  // namespace fsdc::cpu
