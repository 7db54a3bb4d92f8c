// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of truncate on every instruction set, without torch. Bytes per second count what a perfect kernel
// would move: scores once, the kept rows read and written. The scores of 64 layers take turns, so scores and kept rows
// come from memory. What is written stays in one place. The time of a selection must not depend on how scores are
// distributed or on how many stay: select_row runs through both.
#include <benchmark/benchmark.h>

#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/truncate.h"
#include "threads.h"

namespace {

using namespace fsdc;

constexpr int64_t kRows = 8, kHeadDim = 128;

constexpr int64_t kTurns = 64;

struct Distribution {
  const char* name;
  float (*draw)(std::mt19937& generator);
};

float uniform(std::mt19937& generator) { return std::uniform_real_distribution<float>()(generator); }
float heavy_tailed(std::mt19937& generator) { return std::lognormal_distribution<float>(0, 3)(generator); }

constexpr Distribution kDistributions[] = {
    {"heavy_tailed", heavy_tailed},  // accumulated attention
    {"uniform", uniform},
    {"narrow", [](std::mt19937& generator) { return 1.0f + 0.01f * uniform(generator); }},
    {"signed", [](std::mt19937& generator) { return std::normal_distribution<float>()(generator); }},
    {"constant", [](std::mt19937&) { return 1.0f; }},
    {"eight_values", [](std::mt19937& generator) { return std::floor(8.0f * uniform(generator)); }},
    {"mostly_zero", [](std::mt19937& generator) { return std::max(0.0f, uniform(generator) - 0.95f); }},
};

std::vector<float> draw(int64_t count, const Distribution& distribution) {
  std::mt19937 generator(1);
  std::vector<float> scores(count);
  for (float& score : scores) score = distribution.draw(generator);
  return scores;
}

void select_row(benchmark::State& state, cpu::Isa isa, const Distribution& distribution) {
  const int64_t tokens = state.range(0), kept = state.range(1);
  const std::vector<float> scores = draw(kTurns * tokens, distribution);
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
  const std::vector<float> scores = draw(kTurns * kRows * tokens, kDistributions[0]);
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
    for (const Distribution& distribution : kDistributions) {
      for (int64_t tokens : {1536, 4096, 32768, 131072}) {
        for (int64_t kept : {tokens / 64, tokens / 32, tokens / 8, tokens * 2 / 3}) {
          const std::string name = "select_row/" + std::string(cpu::name_of(isa)) + "/" + distribution.name;
          benchmark::RegisterBenchmark(name.c_str(), select_row, isa, distribution)->Args({tokens, kept});
        }
      }
    }
    benchmark::RegisterBenchmark(("truncate/" + std::string(cpu::name_of(isa))).c_str(), truncate, isa)
        ->Args({32768, 1024})
        ->UseRealTime();
  }
  return true;
}();

}  // namespace
