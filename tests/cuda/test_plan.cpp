// SPDX-License-Identifier: Apache-2.0
// How truncate and decode_attention share their work on devices of several kinds. Needs no device.
#include <catch2/catch_test_macros.hpp>

#include "kernels/cuda/decode_attention/plan.h"
#include "kernels/cuda/truncate/plan.h"

using namespace fsdc;
using cuda::DecodePlan;
using cuda::Device;
using cuda::plan_truncate;
using cuda::TruncatePlan;

namespace {

constexpr Device kH200{132, 227 << 10, 228 << 10, 8};
constexpr Device kA100{108, 163 << 10, 164 << 10, 1};
constexpr Device kPartOfH200{16, 227 << 10, 228 << 10, 4};  // as if clusters of 8 found no place
constexpr Device kL40{142, 99 << 10, 100 << 10, 1};

// bf16, D = 128
TruncateParams shape(int64_t rows, int64_t tokens, int64_t kept, bool has_skipped = false) {
  static const float kScore = 0;
  const TokenRows tokens_of{nullptr, 0, 0, 0, 128, nullptr};
  return {.batch = 1,
          .heads = rows,
          .tokens = tokens,
          .kept = kept,
          .has_skipped = has_skipped,
          .dtype = DType::kBFloat16,
          .scores = &kScore,
          .score_batch_stride = 0,
          .score_head_stride = 0,
          .keys = tokens_of,
          .values = tokens_of,
          .indices = nullptr};
}

TruncateParams shape_with_weights(int64_t rows, int64_t tokens, int64_t kept, int64_t queries,
                                  bool has_skipped = false) {
  TruncateParams params = shape(rows, tokens, kept, has_skipped);
  params.scores = nullptr;
  params.weights.group = 1;
  params.weights.queries = queries;
  params.weights.dtype = DType::kFloat32;
  return params;
}

// bf16, D = 128
DecodeAttentionParams decode_shape(int64_t batch, int64_t heads, int64_t slots, int64_t length, int64_t group = 4) {
  DecodeAttentionParams params{};
  params.batch = batch, params.heads = heads, params.group = group;
  params.slots = slots, params.length = length;
  params.dtype = DType::kBFloat16;
  params.keys.dim = params.values.dim = 128;
  return params;
}

DecodePlan plan_decode(const DecodeAttentionParams& params, const Device& device) {
  return cuda::plan_decode_attention(params, device, 256);
}

}  // namespace

TEST_CASE("plan: few rows get clusters where there are any") {
  const TruncatePlan clusters = plan_truncate(shape(8, 32768, 1024), kH200);
  CHECK(clusters.cluster == 8);
  CHECK(clusters.clusters_per_row == 2);  // 128 of 132 multiprocessors
  CHECK(clusters.codes_on_chip);
  const TruncatePlan alone = plan_truncate(shape(8, 32768, 1024), kA100);
  CHECK(alone.cluster == 1);
  CHECK(alone.clusters_per_row == 13);
  CHECK(alone.codes_on_chip);
}

TEST_CASE("plan: many rows get a block each, and so does what is too small to share") {
  for (const Device& device : {kH200, kPartOfH200, kA100, kL40}) {
    for (const TruncateParams& params : {shape(2048, 4096, 1024), shape(1, 40, 20), shape(0, 40, 20)}) {
      const TruncatePlan plan = plan_truncate(params, device);
      CHECK(plan.blocks_per_row() == 1);
      CHECK(plan.codes_on_chip);
    }
  }
}

TEST_CASE("plan: rows longer than a block's memory get a cluster, then are read again") {
  CHECK(plan_truncate(shape(256, 32768, 1024), kH200).cluster == 2);  // two blocks per multiprocessor
  CHECK(plan_truncate(shape(256, 300'000, 1024), kH200).cluster == 8);
  CHECK(plan_truncate(shape(256, 300'000, 1024), kH200).codes_on_chip);
  CHECK_FALSE(plan_truncate(shape(256, 1'000'000, 1024), kH200).codes_on_chip);
  CHECK_FALSE(plan_truncate(shape(256, 32768, 1024), kL40).codes_on_chip);
}

TEST_CASE("plan: codes fit, and no more blocks than multiprocessors share few rows") {
  for (const Device& device : {kH200, kPartOfH200, kA100, kL40}) {
    for (const int64_t rows : {1, 7, 8, 64, 133, 2049}) {
      for (const int64_t tokens : {1, 17, 4096, 32768, 131073, 2'000'000}) {
        for (const bool has_skipped : {false, true}) {
          const TruncateParams params = shape(rows, tokens, tokens / 2, has_skipped);
          const TruncatePlan plan = plan_truncate(params, device);
          CAPTURE(device.multiprocessors, rows, tokens, has_skipped, plan.cluster, plan.clusters_per_row);
          CHECK(plan.cluster <= device.largest_cluster);
          CHECK((plan.cluster & (plan.cluster - 1)) == 0);
          CHECK(plan.cluster <= 8);
          CHECK(cuda::code_bytes(params, plan) + (27 << 10) <= device.shared_bytes_per_block);
          CHECK(rows * (plan.clusters_per_row - 1) * plan.cluster <= device.multiprocessors);
          // Nothing is left over between the blocks of a cluster.
          CHECK(plan.cluster * cuda::tokens_per_block(tokens, plan.cluster) >= tokens);
        }
      }
    }
  }
}

TEST_CASE("plan: weights are summed on the way in where each is read once") {
  CHECK_FALSE(cuda::can_sum_weights({1, 2, true}));
  CHECK_FALSE(cuda::can_sum_weights({1, 1, false}));
  for (const Device& device : {kH200, kPartOfH200, kA100, kL40}) {
    for (const int64_t rows : {1, 8, 64, 2049}) {
      for (const int64_t tokens : {1, 17, 4096, 16384, 32768, 300'000, 2'000'000}) {
        for (const bool has_skipped : {false, true}) {
          const TruncateParams params = shape_with_weights(rows, tokens, tokens / 2, 1, has_skipped);
          const TruncatePlan plan = plan_truncate(params, device);
          CAPTURE(device.multiprocessors, rows, tokens, has_skipped, plan.cluster, plan.clusters_per_row);
          const int64_t on_chip = (device.shared_bytes_per_block - (28 << 10)) / 4 * device.largest_cluster;
          CHECK(cuda::can_sum_weights(plan) == (tokens <= on_chip));
        }
      }
    }
  }
}

TEST_CASE("plan: the bytes of weights count") {
  CHECK(plan_truncate(shape_with_weights(1, 4096, 1, 1), kH200).cluster == 1);  // 16 KiB
  CHECK(plan_truncate(shape_with_weights(1, 4096, 1, 64), kH200).cluster == 8);
}

TEST_CASE("plan: a decode step of few rows takes clusters, or two launches where there are none") {
  const DecodePlan cluster = plan_decode(decode_shape(1, 8, 1024, 5000), kH200);
  CHECK(cluster.cluster == 8);
  CHECK_FALSE(cluster.is_split);
  CHECK(cluster.run_tokens == 129);  // of 1025
  CHECK(plan_decode(decode_shape(8, 8, 1024, 5000), kH200).cluster == 4);
  const DecodeAttentionParams few = decode_shape(1, 8, 1024, 5000);
  const DecodePlan split = plan_decode(few, kA100);
  CHECK(split.is_split);
  CHECK(split.run_tokens == 64);
  CHECK(cuda::scratch_bytes(few, split) == 8 * 17 * cuda::run_layout(few, 64).numbers * 4);
}

TEST_CASE("plan: a decode step of many rows, or of few tokens, takes a block for each") {
  for (const Device& device : {kH200, kPartOfH200, kA100, kL40}) {
    for (const auto& params : {decode_shape(64, 8, 1024, 5000), decode_shape(1, 8, 1024, 100)}) {
      const DecodePlan plan = plan_decode(params, device);
      CHECK(plan.cluster == 1);
      CHECK_FALSE(plan.is_split);
      CHECK(cuda::scratch_bytes(params, plan) == 0);
    }
  }
}

TEST_CASE("plan: positions take the bits of `seen` that counting heads leaves, and never its sign") {
  const auto bits = [](int64_t heads) { return cuda::position_bits(decode_shape(1, heads, 1024, 5000)); };
  CHECK(bits(1) == 31);
  CHECK(bits(2) == 31);
  CHECK(bits(3) == 30);
  CHECK(bits(8) == 29);
  CHECK(bits(9) == 28);
  CHECK(bits(128) == 25);
}

TEST_CASE("plan: a decode step of heads of their own sizes gives long ones more blocks") {
  static const int32_t kLayout = 0;
  DecodeAttentionParams params = decode_shape(1, 8, 8200, 5000);
  params.heads_layout = &kLayout;
  params.layout_rows = 8200;
  const DecodePlan plan = plan_decode(params, kH200);
  CHECK(plan.is_split);
  CHECK(plan.run_tokens == 64);
  CHECK(cuda::runs_per_batch_row(params, plan) == 8200 / 64 + 8);
}

TEST_CASE("plan: whatever a decode step is, its runs hold all tokens and fit") {
  for (const Device& device : {kH200, kPartOfH200, kA100, kL40}) {
    for (const int64_t batch : {1, 7, 300}) {
      for (const int64_t slots : {1, 17, 1024, 30'000, 300'000}) {
        for (const int64_t length : {int64_t{0}, slots / 2, slots + 9}) {
          for (const int64_t group : {1, 8, 71}) {
            const DecodeAttentionParams params = decode_shape(batch, 2, slots, length, group);
            const DecodePlan plan = plan_decode(params, device);
            CAPTURE(device.multiprocessors, batch, slots, length, group, plan.cluster, plan.is_split, plan.run_tokens);
            CHECK(plan.cluster <= device.largest_cluster);
            CHECK((plan.cluster == 1 || !plan.is_split));
            CHECK(cuda::runs_per_row(params, plan) * plan.run_tokens >= cuda::tokens_per_row(params));
            CHECK(cuda::shared_bytes(params, plan, 256) + (1 << 10) <= device.shared_bytes_per_block);
          }
        }
      }
    }
  }
}
