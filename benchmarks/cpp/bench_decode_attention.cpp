// SPDX-License-Identifier: Apache-2.0
// The CPU kernel of decode_attention on every instruction set, without torch: a step of a full cache. Bytes: keys and
// values once, which is what counts; `read` is a sum over the same bytes, the floor. One set of them: what fits into the
// caches stays there from call to call.
#include <benchmark/benchmark.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu.h"
#include "threads.h"

namespace {

using namespace fsdc;

const bench::ThreadPool& threads() {
  static const bench::ThreadPool pool;
  return pool;
}

struct Shape {
  const char* name;
  int64_t heads, group, dim;
};
constexpr Shape kShapes[] = {{"H=8 G=4 D=128", 8, 4, 128}, {"H=3 G=3 D=64", 3, 3, 64}, {"H=4 G=2 D=8", 4, 2, 8}};

// A cache of `slots` tokens, all of them held, in elements of 16 or 32 bits whose numbers are about 1.
struct Cache {
  Cache(const Shape& shape, DType dtype, int64_t slots)
      : shape(shape),
        dtype(dtype),
        slots(slots),
        rows(shape.heads * (slots + 1)),
        keys(numbers(rows * shape.dim)),
        values(numbers(rows * shape.dim)),
        tokens(numbers(shape.heads * (shape.group + 2) * shape.dim)),
        facts(kFacts * rows, 0.5f),
        positions(rows),
        output(shape.heads * shape.group * shape.dim * 4),
        seen(int32_t(slots)) {
    for (int64_t row = 0; row < rows; ++row) positions[row] = int32_t(row % (slots + 1));
  }

  std::vector<uint8_t> numbers(int64_t count) const {
    std::mt19937 generator(1);
    std::vector<uint8_t> bytes(count * element_size(dtype));
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(generator());
    for (size_t i = 0; i < bytes.size(); i += size_t(element_size(dtype))) {  // exponents about 0, either sign
      uint8_t* high = &bytes[i + size_t(element_size(dtype)) - 1];
      *high = uint8_t((*high & 0x80) | (dtype == DType::kFloat16 ? 0x3a : 0x3f));
      if (dtype != DType::kFloat16) high[-1] &= 0x7f;
    }
    return bytes;
  }

  DecodeAttentionParams params() {
    const int64_t D = shape.dim, row = slots + 1;
    const int64_t token = D * element_size(dtype);
    return {.batch = 1,
            .heads = shape.heads,
            .group = shape.group,
            .length = slots,
            .slots = slots,
            .dtype = dtype,
            .heads_layout = nullptr,
            .layout_rows = 0,
            .sink_tokens = 4,
            .recent_tokens = slots / 4,
            .query = {tokens.data(), 0, D},
            .new_keys = {tokens.data() + shape.heads * shape.group * token, 0, D},
            .new_values = {tokens.data() + shape.heads * (shape.group + 1) * token, 0, D},
            .keys = {keys.data(), 0, row * D, D, D},
            .values = {values.data(), 0, row * D, D, D},
            .facts = facts.data(),
            .fact_plane_stride = rows,
            .fact_batch_stride = 0,
            .fact_head_stride = row,
            .positions = positions.data(),
            .position_batch_stride = 0,
            .position_head_stride = row,
            .seen = &seen,
            .seen_stride = 0,
            .valid = nullptr,
            .valid_stride = 0,
            .is_protected = nullptr,
            .protected_stride = 0,
            .scaling = 1 / std::sqrt(double(D)),
            .softcap = 0,
            .sinks = nullptr,
            .sinks_dtype = dtype,
            .decay = 0.99f,
            .prior = 0.02f,
            .value_weight = true,
            .redundancy = 0.95f,
            .skipped_keys = nullptr,
            .skipped_values = nullptr,
            .skipped_count = nullptr,
            .lost = nullptr,
            .skipped_mean = true,
            .output = output.data()};
  }

  int64_t bytes() const { return int64_t(keys.size() + values.size()); }

  Shape shape;
  DType dtype;
  int64_t slots, rows;
  std::vector<uint8_t> keys, values, tokens;
  std::vector<float> facts;
  std::vector<int32_t> positions;
  std::vector<uint8_t> output;
  int32_t seen;
};

void decode_attention(benchmark::State& state, const Shape& shape, DType dtype, cpu::Isa isa,
                      const cpu::Parallel& parallel) {
  Cache cache(shape, dtype, state.range(0));
  for (auto _ : state) {
    cpu::decode_attention(cache.params(), parallel, isa);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * cache.bytes());
}

// The floor: 64-bit words in 32 sums, which any compiler turns into vectors.
void read(benchmark::State& state, const Shape& shape, DType dtype, const cpu::Parallel& parallel) {
  Cache cache(shape, dtype, state.range(0));
  constexpr int64_t kSums = 32, kBytes = 1 << 16;
  for (auto _ : state) {
    for (const std::vector<uint8_t>* part : {&cache.keys, &cache.values}) {
      const int64_t words = int64_t(part->size() / 8);
      parallel.run(words, kBytes / 8, [&](int64_t begin, int64_t end) {
        const uint64_t* from = reinterpret_cast<const uint64_t*>(part->data());
        uint64_t sums[kSums] = {};
        for (int64_t i = begin; i + kSums <= end; i += kSums) {
          for (int64_t k = 0; k < kSums; ++k) sums[k] += from[i + k];
        }
        for (uint64_t sum : sums) benchmark::DoNotOptimize(sum);
      });
    }
  }
  state.SetBytesProcessed(state.iterations() * cache.bytes());
}

const bool kRegistered = [] {
  static const cpu::Sequential one;
  for (const Shape& shape : kShapes) {
    for (const auto& [type, dtype] :
         {std::pair{"fp32", DType::kFloat32}, {"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}}) {
      for (const auto& [count, parallel] :
           {std::pair<const char*, const cpu::Parallel*>{"1 thread", &one}, {"all threads", &threads()}}) {
        const std::string what = std::string(shape.name) + "/" + type + "/" + count;
        const auto with_slots = [&](benchmark::internal::Benchmark* benchmark) {
          benchmark->Arg(256)->Arg(1024)->Arg(4096)->UseRealTime();
        };
        with_slots(benchmark::RegisterBenchmark(("read/" + what).c_str(), read, shape, dtype, std::cref(*parallel)));
        for (const cpu::Isa isa : cpu::available_isas()) {
          with_slots(benchmark::RegisterBenchmark(("decode_attention/" + what + "/" + cpu::name_of(isa)).c_str(),
                                                  decode_attention, shape, dtype, isa, std::cref(*parallel)));
        }
      }
    }
  }
  return true;
}();

}  // namespace
