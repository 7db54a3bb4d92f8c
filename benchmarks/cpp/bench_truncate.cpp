// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of truncate on every instruction set, without torch. Bytes per second count what a perfect kernel
// would move: scores once, the kept rows read and written. The scores of 64 layers take turns, so scores and kept rows
// come from memory. What is written stays in one place.
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/truncate.h"
#include "threads.h"

namespace {

using namespace fsdc;

constexpr int64_t kRows = 8, kHeadDim = 128;

std::vector<float> heavy_tailed(int64_t count) {
  std::mt19937 generator(1);
  std::lognormal_distribution<float> distribution(0, 3);
  std::vector<float> scores(count);
  for (float& score : scores) score = distribution(generator);
  return scores;
}

constexpr int64_t kTurns = 64;

void select_row(benchmark::State& state, cpu::Isa isa) {
  const int64_t tokens = state.range(0), kept = state.range(1);
  const std::vector<float> scores = heavy_tailed(kTurns * tokens);
  std::vector<int64_t> indices(kept);
  int64_t turn = 0;
  for (auto _ : state) {
    cpu::truncate_loops(isa).select_row(scores.data() + turn++ % kTurns * tokens, tokens, kept, indices.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * (tokens * 4 + kept * 8));
}

void truncate(benchmark::State& state, cpu::Isa isa) {
  static const bench::ThreadPool threads;
  const int64_t tokens = state.range(0), kept = state.range(1);
  const std::vector<float> keys(kRows * tokens * kHeadDim, 1.0f), values(keys);
  const std::vector<float> scores = heavy_tailed(kTurns * kRows * tokens);
  std::vector<float> out_keys(kRows * kept * kHeadDim), out_values(out_keys);
  std::vector<int64_t> indices(kRows * kept);
  const auto rows = [&](const std::vector<float>& from, std::vector<float>& to) {
    return TokenRows{from.data(), kRows * tokens * kHeadDim, tokens * kHeadDim, kHeadDim, kHeadDim, to.data()};
  };
  int64_t turn = 0;
  for (auto _ : state) {
    cpu::truncate({.batch = 1,
                   .heads = kRows,
                   .tokens = tokens,
                   .kept = kept,
                   .has_skipped = false,
                   .dtype = DType::kFloat32,
                   .scores = scores.data() + turn++ % kTurns * kRows * tokens,
                   .score_batch_stride = kRows * tokens,
                   .score_head_stride = tokens,
                   .keys = rows(keys, out_keys),
                   .values = rows(values, out_values),
                   .indices = indices.data()},
                  threads, isa);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kRows * (tokens * 4 + kept * (8 + 4 * kHeadDim * 4)));
}

const bool kRegistered = [] {
  for (const cpu::Isa isa : cpu::available_isas()) {
    for (const auto& [tokens, kept] : {std::pair{4096, 1024}, std::pair{32768, 1024}, std::pair{131072, 4096}}) {
      benchmark::RegisterBenchmark(("select_row/" + std::string(cpu::name_of(isa))).c_str(), select_row, isa)
          ->Args({tokens, kept});
    }
    benchmark::RegisterBenchmark(("truncate/" + std::string(cpu::name_of(isa))).c_str(), truncate, isa)
        ->Args({32768, 1024})
        ->UseRealTime();
  }
  return true;
}();

}  // namespace
