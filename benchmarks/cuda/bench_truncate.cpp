// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of truncate without torch, bf16 and D = 128, with a cold cache, from scores or from bf16 attention
// weights of 4 heads per KV head. Bytes are those of kernels/cuda/truncate.cu.
#include <bit>
#include <string>

#include "kernels/cuda/launch.h"
#include "timing.h"

namespace {

using namespace fsdc;
using bench::DeviceBuffer;

constexpr int64_t kHeadDim = 128, kElementBytes = 2, kGroup = 4;

struct Shape {
  int64_t rows, tokens, kept;
  bool has_skipped;
  int64_t queries = 0;  // whose weights are summed; 0: there are scores

  int64_t score_bytes() const { return queries > 0 ? kGroup * queries * kElementBytes : 4; }  // per token
  int64_t entries() const { return kept + has_skipped; }
  double bytes() const {
    const double read = double(has_skipped ? tokens : kept), token_bytes = 2 * kHeadDim * kElementBytes;
    return double(rows) * (double(score_bytes() * tokens) + read * token_bytes + double(entries()) * (token_bytes + 8));
  }
};

// Each of the numbers as two in bf16.
std::vector<float> as_bfloat16(std::vector<float> numbers) {
  for (float& number : numbers) {
    const uint32_t bits = std::bit_cast<uint32_t>(number);
    number = std::bit_cast<float>((bits & 0xffff0000u) | bits >> 16);
  }
  return numbers;
}

// One set of inputs and outputs.
struct Data {
  DeviceBuffer scores;  // or weights
  DeviceBuffer keys, values, out_keys, out_values, indices;

  explicit Data(const Shape& shape)
      : scores(size_t(shape.rows * shape.tokens * shape.score_bytes())),
        keys(size_t(shape.rows * shape.tokens * kHeadDim * kElementBytes)),
        values(size_t(shape.rows * shape.tokens * kHeadDim * kElementBytes)),
        out_keys(size_t(shape.rows * shape.entries() * kHeadDim * kElementBytes)),
        out_values(size_t(shape.rows * shape.entries() * kHeadDim * kElementBytes)),
        indices(size_t(shape.rows * shape.entries() * 8)) {
    static const std::vector<float> numbers = bench::heavy_tailed(1 << 22), pairs = as_bfloat16(numbers);
    scores.fill(shape.queries > 0 ? pairs : numbers);
    for (DeviceBuffer* buffer : {&keys, &values}) buffer->fill(pairs);
  }

  TruncateParams params(const Shape& shape) const {
    const auto rows = [&](const DeviceBuffer& from, const DeviceBuffer& to) {
      return TokenRows{from.data(), shape.rows * shape.tokens * kHeadDim, shape.tokens * kHeadDim, kHeadDim, kHeadDim,
                       to.data()};
    };
    const bool sums = shape.queries > 0;
    return {.batch = 1,
            .heads = shape.rows,
            .tokens = shape.tokens,
            .kept = shape.kept,
            .has_skipped = shape.has_skipped,
            .dtype = DType::kBFloat16,
            .scores = sums ? nullptr : scores.data<float>(),
            .score_batch_stride = shape.rows * shape.tokens,
            .score_head_stride = shape.tokens,
            .keys = rows(keys, out_keys),
            .values = rows(values, out_values),
            .indices = indices.data<int64_t>(),
            .weights = sums ? weights(shape) : AccumulateScoresParams{}};
  }

  AccumulateScoresParams weights(const Shape& shape) const {
    return {.batch = 1,
            .heads = shape.rows,
            .group = kGroup,
            .queries = shape.queries,
            .tokens = shape.tokens,
            .overwrite = true,
            .dtype = DType::kBFloat16,
            .scores = nullptr,
            .score_batch_stride = 0,
            .score_head_stride = 0,
            .score_token_stride = 0,
            .weights = scores.data(),
            .weight_batch_stride = shape.rows * kGroup * shape.queries * shape.tokens,
            .weight_head_stride = shape.queries * shape.tokens,
            .weight_query_stride = shape.tokens,
            .weight_token_stride = 1,
            .query_weights = nullptr,
            .query_weight_batch_stride = 0,
            .query_weight_query_stride = 0,
            .carry = nullptr,
            .carry_stride = 0};
  }
};

void truncate(benchmark::State& state, Shape shape, bool in_graph) {
  if (shape.queries > 0) {
    const Data data(shape);
    if (!cuda::truncate_sums_weights(data.params(shape))) return state.SkipWithError("summed in a launch of its own");
  }
  const int copies = in_graph ? bench::copies_for(shape.bytes()) : 1;
  std::vector<std::unique_ptr<Data>> data;
  for (int i = 0; i < copies; ++i) data.push_back(std::make_unique<Data>(shape));
  const auto launch = [&](int copy, cudaStream_t stream) {
    bench::check(cuda::launch_truncate(data[size_t(copy)]->params(shape), stream));
  };
  if (in_graph) {
    bench::time_in_graph(state, shape.bytes(), copies, launch);
  } else {
    bench::time_eagerly(state, shape.bytes(), launch);
  }
}

const bool kRegistered = [] {
  for (const Shape shape :
       {Shape{8, 4096, 1024, false}, Shape{8, 32768, 1024, false}, Shape{8, 32768, 4096, false},
        Shape{8, 131072, 4096, false}, Shape{64, 32768, 1024, false}, Shape{256, 32768, 1024, false},
        Shape{2048, 4096, 1024, false}, Shape{8, 32768, 1024, true}, Shape{64, 32768, 1024, true},
        Shape{8, 4096, 1024, false, 1}, Shape{8, 32768, 1024, false, 1}, Shape{8, 4096, 1024, false, 64},
        Shape{64, 4096, 1024, true, 1}}) {
    const std::string name = "rows:" + std::to_string(shape.rows) + "/S:" + std::to_string(shape.tokens) +
                             "/kept:" + std::to_string(shape.kept) + (shape.has_skipped ? "/skipped" : "") +
                             (shape.queries > 0 ? "/queries:" + std::to_string(shape.queries) : "");
    for (const bool in_graph : {true, false}) {
      bench::count_by_events(benchmark::RegisterBenchmark(
          ((in_graph ? "truncate/graph/" : "truncate/eager/") + name).c_str(), truncate, shape, in_graph));
    }
  }
  return true;
}();

}  // namespace
