// SPDX-License-Identifier: Apache-2.0
// The CPU kernel of chunk_attention on every instruction set, without torch, on one thread: Q new tokens after T held
// ones. What counts are its multiplications: `FLOPS` is 4 G Q (T + Q / 2) D a head.
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu.h"

namespace {

using namespace fsdc;

constexpr int64_t kHeads = 2, kGroup = 4, kDim = 128;

// Numbers about 1, in elements of 16 or 32 bits.
std::vector<uint16_t> numbers(int64_t count, DType dtype) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> halves(count * element_size(dtype) / 2);
  for (size_t i = 0; i < halves.size(); ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(normal(generator));
    halves[i] = static_cast<uint16_t>(dtype == DType::kFloat32 && i % 2 == 0 ? bits : bits >> 16);
  }
  return halves;
}

void chunk_attention(benchmark::State& state, cpu::Isa isa, DType dtype, bool redundancy) {
  const int64_t held = state.range(0), queries = state.range(1), tokens = held + queries;
  const std::vector<uint16_t> query = numbers(kHeads * kGroup * queries * kDim, dtype);
  const std::vector<uint16_t> keys = numbers(kHeads * tokens * kDim, dtype), values = keys;
  std::vector<float> facts(4 * kHeads * tokens, 0.1f), output(kHeads * kGroup * queries * kDim);
  ChunkAttentionParams params{};
  params.batch = 1;
  params.heads = kHeads;
  params.group = kGroup;
  params.queries = queries;
  params.held = held;
  params.dtype = dtype;
  params.query = {query.data(), kHeads * kGroup * queries * kDim, queries * kDim, kDim, kDim};
  params.keys = {keys.data(), kHeads * tokens * kDim, tokens * kDim, kDim, kDim};
  params.values = {values.data(), kHeads * tokens * kDim, tokens * kDim, kDim, kDim};
  params.facts = facts.data();
  params.fact_plane_stride = params.fact_batch_stride = kHeads * tokens;
  params.fact_head_stride = tokens;
  params.redundancy = redundancy;
  params.scaling = 0.09;
  params.output = output.data();
  for (auto _ : state) {
    cpu::chunk_attention(params, cpu::Sequential(), isa);
    benchmark::ClobberMemory();
  }
  const double seen = static_cast<double>(queries) * (static_cast<double>(held) + static_cast<double>(queries + 1) / 2);
  state.counters["FLOPS"] =
      benchmark::Counter(4.0 * kHeads * kGroup * kDim * seen, benchmark::Counter::kIsIterationInvariantRate);
}

const bool kRegistered = [] {
  for (const cpu::Isa isa : cpu::available_isas()) {
    for (const auto& [name, dtype] : {std::pair{"fp32", DType::kFloat32}, std::pair{"bf16", DType::kBFloat16}}) {
      for (const bool redundancy : {false, true}) {
        const std::string of_isa = "chunk_attention/" + std::string(cpu::name_of(isa)) + "/" + name;
        benchmark::RegisterBenchmark((of_isa + (redundancy ? "/redundancy" : "")).c_str(), chunk_attention, isa, dtype,
                                     redundancy)
            ->ArgNames({"T", "Q"})
            ->Args({0, 512})
            ->Args({1024, 512})
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  return true;
}();

}  // namespace
