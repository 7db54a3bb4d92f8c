// SPDX-License-Identifier: Apache-2.0
// Where the work of a block of decode_attention lies: its row, its run of the row's tokens, and the memory of runs.
#pragma once

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/decode_attention.h"
#include "plan.h"

namespace fsdc::cuda {

enum class DecodePhase {
  kWhole,   // a cluster for each row: attends, merges, evicts
  kAttend,  // a block for each run, which it leaves in memory
  kFinish,  // a block for each row, which finds its runs there
};

// The plan, and what follows from it.
struct DecodeLaunch {
  DecodePhase phase;
  uint32_t cluster;
  uint32_t seen_shift;  // see take_position()
  int64_t run_tokens;
  int64_t runs_per_batch_row;  // at most
  int key_lanes, value_lanes;
  DecodeSharedLayout shared;
  DecodeRunLayout run;
  void* scratch;  // of split rows: [B, runs_per_batch_row] runs
};

// One (batch, KV head). In shared memory, where it takes no registers from the loops.
template <class T>
struct DecodeRow {
  int64_t b, h, index;
  int64_t slots;   // N_h
  int64_t in_use;  // T_h
  int64_t sink_tokens, recent_tokens;
  T* keys;             // [N_h, D]
  T* values;           // [N_h, Dv]
  float* facts;        // [kFacts, N_h], planes fact_plane_stride apart
  int32_t* positions;  // [N_h]
  const T* query;      // [G, D]
  const T* new_key;    // [D]
  const T* new_value;  // [Dv]
  T* output;           // [G, Dv]
};

template <class T>
__device__ DecodeRow<T> row_of(const DecodeAttentionParams& p, int64_t b, int64_t h) {
  const int32_t* const layout = p.heads_layout == nullptr ? nullptr : p.heads_layout + 4 * h;
  const auto first = [&](int64_t batch_stride, int64_t head_stride, int64_t slot_stride) {
    return b * batch_stride + (layout == nullptr ? h * head_stride : layout[0] * slot_stride);
  };
  const int64_t index = b * p.heads + h, slots = layout == nullptr ? p.slots : layout[1];
  return {.b = b,
          .h = h,
          .index = index,
          .slots = slots,
          .in_use = min(p.length, slots),
          .sink_tokens = layout == nullptr ? p.sink_tokens : layout[2],
          .recent_tokens = layout == nullptr ? p.recent_tokens : layout[3],
          .keys = static_cast<T*>(p.keys.data) + first(p.keys.batch_stride, p.keys.head_stride, p.keys.slot_stride),
          .values =
              static_cast<T*>(p.values.data) + first(p.values.batch_stride, p.values.head_stride, p.values.slot_stride),
          .facts = p.facts + first(p.fact_batch_stride, p.fact_head_stride, 1),
          .positions = p.positions + first(p.position_batch_stride, p.position_head_stride, 1),
          .query = static_cast<const T*>(p.query.data) + b * p.query.batch_stride + h * p.group * p.query.head_stride,
          .new_key = static_cast<const T*>(p.new_keys.data) + b * p.new_keys.batch_stride + h * p.new_keys.head_stride,
          .new_value =
              static_cast<const T*>(p.new_values.data) + b * p.new_values.batch_stride + h * p.new_values.head_stride,
          .output = static_cast<T*>(p.output) + index * p.group * p.values.dim};
}

__device__ inline bool is_valid(const DecodeAttentionParams& p, int64_t batch) {
  return p.valid == nullptr || p.valid[batch * p.valid_stride];
}

__device__ inline int64_t runs_of_head(const DecodeAttentionParams& p, const DecodeLaunch& plan, int64_t head) {
  const int64_t slots = p.heads_layout == nullptr ? p.slots : p.heads_layout[4 * head + 1];
  return (min(p.length, slots) + plan.run_tokens) / plan.run_tokens;  // of in_use + 1 tokens
}

// `tokens` tokens from `begin` on, of which the first `held` lie in slots; one behind these, if any, is the new one.
struct DecodeRun {
  __device__ DecodeRun(const DecodeLaunch& plan, int64_t run, int64_t in_use)
      : begin(min(run * plan.run_tokens, in_use + 1)) {
    tokens = static_cast<int>(min(plan.run_tokens, in_use + 1 - begin));
    held = static_cast<int>(min(int64_t{tokens}, in_use - begin));
    held = max(held, 0);
  }

  int64_t begin;
  int tokens, held;
};

// The parts of a run's memory, on this chip, on that of a peer or on the device.
template <class A>
struct DecodeRunMemory {
  __device__ DecodeRunMemory(A* memory, const DecodeRunLayout& at)
      : outputs(memory),
        maxima(memory + at.maxima),
        sums(memory + at.sums),
        entry_logits(memory + at.entry_logits),
        logits(memory + at.logits) {}

  A* outputs;
  A* maxima;
  A* sums;
  A* entry_logits;
  A* logits;
};

// kPack numbers of shared memory, 16 bytes at a time where that many are aligned.
template <int kPack, class A>
__device__ Pack<A, kPack> read_pack(const A* from) {
  constexpr int kBytes = sizeof(A) * kPack < 16 ? sizeof(A) * kPack : 16, kNumbers = kBytes / int{sizeof(A)};
  Pack<A, kPack> pack;
  FSDC_UNROLL
  for (int i = 0; i < kPack; i += kNumbers) {
    const auto word = *reinterpret_cast<const Access<kBytes>*>(from + i);
    std::memcpy(pack.items + i, &word, kBytes);
  }
  return pack;
}

template <class A>
__device__ A warp_sum(A value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

template <class A>
__device__ A warp_max(A value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

}  // namespace fsdc::cuda
