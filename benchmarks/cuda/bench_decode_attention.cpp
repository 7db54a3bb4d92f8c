// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel of decode_attention without torch, on full caches in bf16, cold. Bytes are those of
// kernels/cuda/decode_attention/decode_attention.cu.
#include <cmath>
#include <string>

#include "kernels/cuda/launch.h"
#include "timing.h"

namespace {

using namespace fsdc;
using bench::DeviceBuffer;

struct Shape {
  int64_t batch, heads, group, slots, dim;

  int64_t rows() const { return batch * heads; }
  int64_t row_slots() const { return slots + 1; }
  double bytes() const { return double(rows() * slots) * double(4 * dim + 28); }
};

struct Data {
  DeviceBuffer query, token, keys, values, facts, positions, seen, output, scratch;

  explicit Data(const Shape& shape)
      : query(size_t(shape.rows() * shape.group * shape.dim * 2)),
        token(size_t(shape.rows() * shape.dim * 2)),
        keys(size_t(shape.rows() * shape.row_slots() * shape.dim * 2)),
        values(size_t(shape.rows() * shape.row_slots() * shape.dim * 2)),
        facts(size_t(kFacts * shape.rows() * shape.row_slots() * 4)),
        positions(size_t(shape.rows() * shape.row_slots() * 4)),
        seen(size_t(shape.batch * 4)),
        output(size_t(shape.rows() * shape.group * shape.dim * 2)),
        scratch(scratch_of(shape)) {
    static const std::vector<float> numbers = bench::heavy_tailed(1 << 22);
    for (DeviceBuffer* buffer : {&query, &token, &keys, &values}) buffer->fill(numbers);  // two bf16 in each
    facts.fill(numbers);
    std::vector<int32_t> slots(size_t(shape.rows() * shape.row_slots()));
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = int32_t(i % size_t(shape.row_slots()));
    const std::vector<int32_t> tokens(size_t(shape.batch), int32_t(shape.slots));
    bench::check(cudaMemcpy(positions.data(), slots.data(), slots.size() * 4, cudaMemcpyHostToDevice));
    bench::check(cudaMemcpy(seen.data(), tokens.data(), tokens.size() * 4, cudaMemcpyHostToDevice));
  }

  static size_t scratch_of(const Shape& shape) { return size_t(cuda::scratch_bytes(params_of(shape), plan_of(shape))); }

  static cuda::DecodePlan plan_of(const Shape& shape) {
    cuda::DecodePlan plan;
    bench::check(cuda::plan_decode_attention(params_of(shape), plan));
    return plan;
  }

  static DecodeAttentionParams params_of(const Shape& shape) {
    const int64_t row = shape.row_slots();
    const SlotRows slots{nullptr, shape.heads * row * shape.dim, row * shape.dim, shape.dim, shape.dim};
    const TokenInput token{nullptr, shape.heads * shape.dim, shape.dim};
    DecodeAttentionParams params{};
    params.batch = shape.batch, params.heads = shape.heads, params.group = shape.group;
    params.length = params.slots = shape.slots;
    params.dtype = DType::kBFloat16;
    params.sink_tokens = 4, params.recent_tokens = 64;
    params.query = {nullptr, shape.heads * shape.group * shape.dim, shape.dim};
    params.new_keys = params.new_values = token;
    params.keys = params.values = slots;
    params.fact_plane_stride = shape.rows() * row;
    params.fact_batch_stride = params.position_batch_stride = shape.heads * row;
    params.fact_head_stride = params.position_head_stride = row;
    params.seen_stride = 1;
    params.scaling = 1 / std::sqrt(double(shape.dim));
    params.decay = 1, params.prior = 0.05f, params.value_weight = true, params.redundancy = 0.95f;
    return params;
  }

  DecodeAttentionParams params(const Shape& shape) const {
    DecodeAttentionParams params = params_of(shape);
    params.query.data = query.data();
    params.new_keys.data = params.new_values.data = token.data();
    params.keys.data = keys.data(), params.values.data = values.data();
    params.facts = facts.data<float>(), params.positions = positions.data<int32_t>();
    params.seen = seen.data<int32_t>(), params.output = output.data();
    return params;
  }
};

void decode_attention(benchmark::State& state, Shape shape) {
  const int copies = bench::copies_for(shape.bytes());
  std::vector<std::unique_ptr<Data>> data;
  for (int i = 0; i < copies; ++i) data.push_back(std::make_unique<Data>(shape));
  const cuda::DecodePlan plan = Data::plan_of(shape);
  bench::time_in_graph(state, shape.bytes(), copies, [&](int copy, cudaStream_t stream) {
    const Data& of_copy = *data[size_t(copy)];
    bench::check(cuda::launch_decode_attention(of_copy.params(shape), plan, of_copy.scratch.data(), stream));
  });
}

const bool kRegistered = [] {
  for (const int64_t batch : {1, 8, 64}) {
    for (const int64_t slots : {256, 1024, 4096}) {
      for (const int64_t group : {1, 4, 8}) {
        const Shape shape{batch, 8, group, slots, 128};
        const std::string name =
            "B:" + std::to_string(batch) + "/H:8/G:" + std::to_string(group) + "/C:" + std::to_string(slots) + "/D:128";
        bench::count_by_events(
            benchmark::RegisterBenchmark(("decode_attention/graph/" + name).c_str(), decode_attention, shape));
      }
    }
  }
  return true;
}();

}  // namespace
