// SPDX-License-Identifier: Apache-2.0
// What decode_attention should take on GPUs that nobody has run it on: a table, from the plan that it would be launched
// with and a few assumptions, which stand here. Needs the headers of the CUDA toolkit, and no GPU:
//
//   g++ -std=c++20 -I. -I/usr/local/cuda/include benchmarks/cuda/predict/decode_attention.cpp -o predict && ./predict
//
//   time = launch + latencies + bytes / rate
//   rate = the least of what memory gives, what the loads in flight ask for, and what the instructions leave time for
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/cuda/decode_attention/plan.h"

namespace {

using namespace fsdc;

struct Gpu {
  const char* name;
  cuda::Device device;
  double bandwidth;  // bytes per us, on paper
  double clock;      // cycles per us
};

constexpr Gpu kGpus[] = {{"H100", {132, 227 << 10, 228 << 10, 8}, 3.35e6, 1755},
                         {"H200", {132, 227 << 10, 228 << 10, 8}, 4.8e6, 1755}};

// Assumed.
constexpr double kLaunch = 1.5;             // us, of a kernel in a graph
constexpr double kLatency = 0.8;            // us from a load of cold memory to its data
constexpr double kBarrier = 0.3;            // us of a cluster
constexpr double kShareOfBandwidth = 0.92;  // that streaming kernels get

constexpr double kIssued = 0.05;  // of what a multiprocessor can issue, for each warp; at most 0.8

// Known of the kernel.
constexpr int kThreads = 256, kRegisters = 128;
constexpr double kLoadsAhead = 7;  // of 16 bytes: 8 of keys, 6 of values
// Instructions of a warp for a slot in bf16 at D = 128: the inner loops of attend.cuh, counted in the code for sm_90.
constexpr double instructions_per_slot(int64_t group) { return 32 + 9.75 * double(group + 1) + 5 * double(group); }

DecodeAttentionParams shape(int64_t batch, int64_t heads, int64_t group, int64_t slots, int64_t dim) {
  DecodeAttentionParams params{};
  params.batch = batch, params.heads = heads, params.group = group;
  params.length = params.slots = slots;
  params.dtype = DType::kBFloat16;
  params.keys.dim = params.values.dim = dim;
  return params;
}

void predict(const Gpu& gpu, int64_t batch, int64_t slots) {
  constexpr int64_t kHeads = 8, kGroup = 4, kDim = 128;
  const DecodeAttentionParams params = shape(batch, kHeads, kGroup, slots, kDim);
  const cuda::DecodePlan plan = cuda::plan_decode_attention(params, gpu.device, kThreads);
  const int64_t shared = cuda::shared_bytes(params, plan, kThreads) + 2048;  // and what the system takes
  const int64_t blocks = batch * kHeads * plan.cluster;
  const int64_t at_once =
      std::min<int64_t>(65536 / (kRegisters * kThreads), gpu.device.shared_bytes_per_multiprocessor / shared);
  const double sms = double(gpu.device.multiprocessors);
  const double busy = std::min(double(blocks), sms), resident = std::min(double(blocks), sms * double(at_once));
  const double warps = resident / busy * kThreads / 32;  // of a multiprocessor
  const double waves = double(blocks) / (sms * double(at_once));

  const double all_slots = double(batch * kHeads * slots), bytes = all_slots * double(4 * kDim + 28);
  const double floor = bytes / gpu.bandwidth;
  const double in_flight = resident * kThreads * 16 * kLoadsAhead / kLatency;
  const double issued =
      4 * std::min(kIssued * warps, 0.8) * busy * gpu.clock / instructions_per_slot(kGroup) * double(4 * kDim + 28);
  const double rate = std::min({kShareOfBandwidth * gpu.bandwidth, in_flight, issued});
  const char* limit = rate == in_flight ? "loads in flight" : rate == issued ? "instructions" : "memory";
  const double fixed = kLaunch + 2 * kLatency + (plan.cluster > 1 ? 2 * kBarrier : 0);  // queries, then keys
  std::printf(
      "| %s | %lld | %lld | %.1f MB | %.1f us | %lld x %u of %lld tokens | %lld, %.0f%% | %.2f | %s | %.1f us |\n",
      gpu.name, static_cast<long long>(batch), static_cast<long long>(slots), bytes * 1e-6, floor,
      static_cast<long long>(batch * kHeads), plan.cluster, static_cast<long long>(plan.run_tokens),
      static_cast<long long>(at_once), 100.0 * double(at_once) * kThreads / 2048, waves, limit, fixed + bytes / rate);
}

}  // namespace

int main() {
  std::printf(
      "| GPU | B | C | bytes | floor | rows x blocks | blocks per SM, occupancy | waves | limited by | predicted |\n"
      "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- | ---: |\n");
  for (const Gpu& gpu : kGpus) {
    for (const int64_t batch : {1, 8, 64}) {
      for (const int64_t slots : {1024, 4096}) predict(gpu, batch, slots);
    }
  }
}
