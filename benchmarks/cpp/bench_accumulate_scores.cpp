// SPDX-License-Identifier: Apache-2.0
// The CPU kernel of accumulate_scores on every instruction set, without torch. Bytes: the weights once, scores read and
// written. One set of them all: what fits into the caches stays there from call to call.
#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "threads.h"

namespace {

using namespace fsdc;

constexpr int64_t kHeads = 8, kGroup = 4;

void accumulate_scores(benchmark::State& state, cpu::Isa isa) {
  static const bench::ThreadPool threads;
  const int64_t queries = state.range(0), tokens = state.range(1);
  std::vector<float> scores(kHeads * tokens);
  const std::vector<float> weights(kHeads * kGroup * queries * tokens, 1e-6f);
  for (auto _ : state) {
    cpu::accumulate_scores({.batch = 1,
                            .heads = kHeads,
                            .group = kGroup,
                            .queries = queries,
                            .tokens = tokens,
                            .overwrite = false,
                            .dtype = DType::kFloat32,
                            .scores = scores.data(),
                            .score_batch_stride = kHeads * tokens,
                            .score_head_stride = tokens,
                            .score_token_stride = 1,
                            .weights = weights.data(),
                            .weight_batch_stride = kHeads * kGroup * queries * tokens,
                            .weight_head_stride = queries * tokens,
                            .weight_query_stride = tokens,
                            .weight_token_stride = 1,
                            .query_weights = nullptr,
                            .query_weight_batch_stride = 0,
                            .query_weight_query_stride = 0,
                            .carry = nullptr,
                            .carry_stride = 0},
                           threads, isa);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * int64_t(sizeof(float) * (weights.size() + 2 * scores.size())));
}

const bool kRegistered = [] {
  for (const cpu::Isa isa : cpu::available_isas()) {
    benchmark::RegisterBenchmark(("accumulate_scores/" + std::string(cpu::name_of(isa))).c_str(), accumulate_scores,
                                 isa)
        ->Args({1, 1024})
        ->Args({1, 32768})
        ->Args({256, 4096})
        ->UseRealTime();
  }
  return true;
}();

}  // namespace
