// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/chunk_attention.h"

#include <atomic>
#include <memory>
#include <vector>

#include "kernels/cpu/cpu.h"

namespace fsdc::cpu {

namespace portable {
extern const ChunkAttentionLoops kChunkAttentionLoops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const ChunkAttentionLoops kChunkAttentionLoops;
}
namespace avx512 {
extern const ChunkAttentionLoops kChunkAttentionLoops;
}
namespace amx {
extern const ChunkAttentionLoops kChunkAttentionLoops;
}
#endif

const ChunkAttentionLoops& chunk_attention_loops([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAmx) return amx::kChunkAttentionLoops;
  if (isa >= Isa::kAvx512) return avx512::kChunkAttentionLoops;
  if (isa >= Isa::kAvx2) return avx2::kChunkAttentionLoops;
#endif
  return portable::kChunkAttentionLoops;
}

void chunk_attention(const ChunkAttentionParams& params, const Parallel& parallel, Isa isa) {
  const int64_t rows = params.batch * params.heads;
  if (rows == 0 || params.queries == 0) return;
  const ChunkAttentionLoops& loops = chunk_attention_loops(isa);
  const ChunkPlan plan(params, isa >= Isa::kAmx);
  const int64_t attending = rows * plan.units, comparing = rows * plan.compared_units;
  std::vector<ChunkUnit> found(attending);
  std::unique_ptr<float[]> votes;
  if (params.facts != nullptr) {
    votes = std::make_unique<float[]>(attending * plan.tokens);
    for (int64_t unit = 0; unit < attending; ++unit) found[unit].votes = votes.get() + unit * plan.tokens;
  }
  const int64_t number = params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t bytes = ChunkPlan::divided(plan.numbers * number, 64) * 64;
  const int64_t threads = std::min(parallel.threads(), attending + comparing);
  const auto memory = std::make_unique_for_overwrite<char[]>(threads * bytes + 64);
  char* const first = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
  std::atomic<int64_t> thread = 0;
  parallel.run(attending + comparing, 1, [&](int64_t begin, int64_t end) {
    char* const mine = first + thread++ * bytes;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit >= attending) {
        const int64_t compared = unit - attending;
        loops.compare(params, plan, compared / plan.compared_units, compared % plan.compared_units, mine);
        continue;
      }
      // Later queries see more: a row's first unit is followed by its last, so that threads have about as much to do.
      const int64_t row = unit / plan.units, turn = unit % plan.units;
      const int64_t of_row = turn % 2 == 0 ? turn / 2 : plan.units - 1 - turn / 2;
      loops.attend(params, plan, row, of_row, mine, found[row * plan.units + of_row]);
    }
  });
  for (int64_t row = 0; row < rows; ++row) loops.add_votes(params, plan, row, &found[row * plan.units]);
}

}  // namespace fsdc::cpu
