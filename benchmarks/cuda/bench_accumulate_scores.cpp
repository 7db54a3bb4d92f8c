// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of accumulate_scores without torch, with a cold cache. Bytes are those of
// kernels/cuda/accumulate_scores.cu.
#include <string>

#include "kernels/cuda/launch.h"
#include "timing.h"

namespace {

using namespace fsdc;
using bench::DeviceBuffer;

struct Shape {
  int64_t batch, heads, group, queries, tokens;

  int64_t weights() const { return batch * heads * group * queries * tokens; }
  double bytes() const { return 4 * double(weights()) + 8 * double(batch * heads * tokens); }
};

struct Data {
  DeviceBuffer scores, weights;

  explicit Data(const Shape& shape)
      : scores(size_t(shape.batch * shape.heads * shape.tokens * 4)), weights(size_t(shape.weights() * 4)) {
    static const std::vector<float> numbers = bench::heavy_tailed(1 << 22);
    scores.fill(numbers);
    weights.fill(numbers);
  }

  AccumulateScoresParams params(const Shape& shape) const {
    return {.batch = shape.batch,
            .heads = shape.heads,
            .group = shape.group,
            .queries = shape.queries,
            .tokens = shape.tokens,
            .overwrite = false,
            .dtype = DType::kFloat32,
            .scores = scores.data<float>(),
            .score_batch_stride = shape.heads * shape.tokens,
            .score_head_stride = shape.tokens,
            .score_token_stride = 1,
            .weights = weights.data(),
            .weight_batch_stride = shape.heads * shape.group * shape.queries * shape.tokens,
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

void accumulate_scores(benchmark::State& state, Shape shape) {
  const int copies = bench::copies_for(shape.bytes());
  std::vector<std::unique_ptr<Data>> data;
  for (int i = 0; i < copies; ++i) data.push_back(std::make_unique<Data>(shape));
  bench::time_in_graph(state, shape.bytes(), copies, [&](int copy, cudaStream_t stream) {
    bench::check(cuda::launch_accumulate_scores(data[size_t(copy)]->params(shape), stream));
  });
}

const bool kRegistered = [] {
  for (const Shape shape : {Shape{1, 8, 4, 1, 4096}, Shape{1, 8, 4, 512, 4096}, Shape{16, 8, 4, 1, 32768}}) {
    const std::string name = "B:" + std::to_string(shape.batch) + "/H:" + std::to_string(shape.heads) +
                             "/G:" + std::to_string(shape.group) + "/Q:" + std::to_string(shape.queries) +
                             "/S:" + std::to_string(shape.tokens);
    bench::count_by_events(
        benchmark::RegisterBenchmark(("accumulate_scores/graph/" + name).c_str(), accumulate_scores, shape));
  }
  return true;
}();

}  // namespace
