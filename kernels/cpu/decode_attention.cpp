// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/decode_attention.h"

#include <vector>

#include "kernels/cpu/cpu.h"

namespace fsdc::cpu {

namespace portable {
extern const DecodeAttentionLoops kDecodeAttentionLoops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const DecodeAttentionLoops kDecodeAttentionLoops;
}
namespace avx512 {
extern const DecodeAttentionLoops kDecodeAttentionLoops;
}
#endif

const DecodeAttentionLoops& decode_attention_loops([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512::kDecodeAttentionLoops;
  if (isa >= Isa::kAvx2) return avx2::kDecodeAttentionLoops;
#endif
  return portable::kDecodeAttentionLoops;
}

namespace {

// At least `bytes`, aligned for vectors; kept by the thread, since a decode step comes again with the same sizes.
char* memory_of_thread(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  static thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + kAlignment) memory.resize(static_cast<size_t>(bytes + kAlignment));
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kAlignment - start % kAlignment);
}

}  // namespace

void decode_attention(const DecodeAttentionParams& params, const Parallel& parallel, Isa isa) {
  constexpr int64_t kBytesPerThread = 1 << 17;  // below this another thread costs more than it brings
  const DecodeAttentionLoops& loops = decode_attention_loops(isa);
  const DecodePlan plan(params);
  const int64_t rows = params.batch * params.heads;
  const int64_t run_bytes = plan.numbers * (params.dtype == DType::kFloat64 ? 8 : 4);
  const int64_t unit_bytes = plan.run_tokens * (params.keys.dim + params.values.dim) * element_size(params.dtype);
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, unit_bytes));
  if (plan.runs == 1) {
    parallel.run(rows, grain, [&](int64_t begin, int64_t end) {
      char* memory = memory_of_thread(run_bytes);
      for (int64_t row = begin; row < end; ++row) {
        loops.attend_run(params, plan, row, 0, memory);
        loops.finish_run(params, plan, row, 0, memory);
        loops.finish_row(params, plan, row, memory);
      }
    });
  } else {
    char* memory = memory_of_thread(rows * plan.runs * run_bytes);
    const auto of_row = [&](int64_t row) { return memory + row * plan.runs * run_bytes; };
    parallel.run(rows * plan.runs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / plan.runs, run = unit % plan.runs;
        loops.attend_run(params, plan, row, run, of_row(row) + run * run_bytes);
      }
    });
    parallel.run(rows * plan.runs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        loops.finish_run(params, plan, unit / plan.runs, unit % plan.runs, of_row(unit / plan.runs));
      }
    });
    for (int64_t row = 0; row < rows; ++row) loops.finish_row(params, plan, row, of_row(row));
  }
  for (int64_t b = 0; b < params.batch; ++b) {
    if (params.valid == nullptr || params.valid[b * params.valid_stride]) params.seen[b * params.seen_stride] += 1;
  }
}

}  // namespace fsdc::cpu
