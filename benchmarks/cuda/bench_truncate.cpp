// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of truncate without torch, bf16 and D = 128, with a cold cache. Bytes are those of
// kernels/cuda/truncate.cu.
#include <string>

#include "kernels/cuda/launch.h"
#include "timing.h"

namespace {

using namespace fsdc;
using bench::DeviceBuffer;

constexpr int64_t kHeadDim = 128, kElementBytes = 2;

struct Shape {
  int64_t rows, tokens, kept;
  bool has_skipped;

  int64_t entries() const { return kept + has_skipped; }
  double bytes() const {
    const double read = double(has_skipped ? tokens : kept), token_bytes = 2 * kHeadDim * kElementBytes;
    return double(rows) * (4 * double(tokens) + read * token_bytes + double(entries()) * (token_bytes + 8));
  }
};

// One set of inputs and outputs.
struct Data {
  DeviceBuffer scores, keys, values, out_keys, out_values, indices;

  explicit Data(const Shape& shape)
      : scores(size_t(shape.rows * shape.tokens * 4)),
        keys(size_t(shape.rows * shape.tokens * kHeadDim * kElementBytes)),
        values(size_t(shape.rows * shape.tokens * kHeadDim * kElementBytes)),
        out_keys(size_t(shape.rows * shape.entries() * kHeadDim * kElementBytes)),
        out_values(size_t(shape.rows * shape.entries() * kHeadDim * kElementBytes)),
        indices(size_t(shape.rows * shape.entries() * 8)) {
    static const std::vector<float> numbers = bench::heavy_tailed(1 << 22);
    for (DeviceBuffer* buffer : {&scores, &keys, &values}) buffer->fill(numbers);
  }

  TruncateParams params(const Shape& shape) const {
    const auto rows = [&](const DeviceBuffer& from, const DeviceBuffer& to) {
      return TokenRows{from.data(), shape.rows * shape.tokens * kHeadDim, shape.tokens * kHeadDim, kHeadDim, kHeadDim,
                       to.data()};
    };
    return {.batch = 1,
            .heads = shape.rows,
            .tokens = shape.tokens,
            .kept = shape.kept,
            .has_skipped = shape.has_skipped,
            .dtype = DType::kBFloat16,
            .scores = scores.data<float>(),
            .score_batch_stride = shape.rows * shape.tokens,
            .score_head_stride = shape.tokens,
            .keys = rows(keys, out_keys),
            .values = rows(values, out_values),
            .indices = indices.data<int64_t>()};
  }
};

void truncate(benchmark::State& state, Shape shape, bool in_graph) {
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
        Shape{2048, 4096, 1024, false}, Shape{8, 32768, 1024, true}, Shape{64, 32768, 1024, true}}) {
    const std::string name = "rows:" + std::to_string(shape.rows) + "/S:" + std::to_string(shape.tokens) +
                             "/kept:" + std::to_string(shape.kept) + (shape.has_skipped ? "/skipped" : "");
    for (const bool in_graph : {true, false}) {
      benchmark::RegisterBenchmark(((in_graph ? "truncate/graph/" : "truncate/eager/") + name).c_str(), truncate, shape,
                                   in_graph)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->Iterations(20)
          ->Repetitions(11);
    }
  }
  return true;
}();

}  // namespace
