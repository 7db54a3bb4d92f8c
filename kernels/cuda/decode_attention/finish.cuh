// SPDX-License-Identifier: Apache-2.0
// What follows once all runs of a row have been attended to: output, scores and redundancy, and the new token's slot.
//
// The blocks of a cluster share the output, and each does the scores of its own run; then the first of them has what it
// needs to put the new token into its slot. Of a row that was split, one block does all.
#pragma once

#include "evict.cuh"
#include "row.cuh"

namespace fsdc::cuda {

constexpr uint32_t kMostBlocks = 8;  // of a cluster

// What the first block of a row tells the others, or hears from them.
struct RowNews {
  int32_t position;              // of the new token
  float received;                // its attention
  Candidate least[kMostBlocks];  // of each block's slots
};

struct NewToken {
  float weight;     // norm of its value
  float key_scale;  // 1 over the norm of its key
};

// A warp each.
template <int kThreads, class T>
__device__ void read_new_token(const DecodeAttentionParams& p, const DecodeRow<T>& row, NewToken& token) {
  const auto norm_of = [](const T* vector, int64_t dim) {
    Accumulator<T> sum = 0;
    FSDC_NO_UNROLL
    for (int64_t d = lane_index(); d < dim; d += kWarpThreads) {
      sum = multiply_add(widen(vector[d]), widen(vector[d]), sum);
    }
    return sqrtf(static_cast<float>(warp_sum(sum)));
  };
  if (warp_index() == 0) {
    const float norm = norm_of(row.new_key, p.keys.dim);
    if (lane_index() == 0) token.key_scale = 1.0f / max(norm, 1e-12f);
  }
  if (warp_index() == kThreads / kWarpThreads - 1) {
    const float norm = norm_of(row.new_value, p.values.dim);
    if (lane_index() == 0) token.weight = norm;
  }
}

// `seen` of a batch row is the position of its new token, and is raised by one. Every head wants to read it and one
// must write it, but only once all have read; so its upper bits count who has, and the last one puts it right.
__device__ inline uint32_t take_position(const DecodeAttentionParams& p, const DecodeLaunch& plan, int64_t batch) {
  return atomicAdd(reinterpret_cast<uint32_t*>(p.seen + batch * p.seen_stride), 1u << plan.seen_shift);
}

// The position, from what take_position() has found.
__device__ inline int32_t put_position(const DecodeAttentionParams& p, const DecodeLaunch& plan, int64_t batch,
                                       uint32_t found) {
  const uint32_t position = found & ((1u << plan.seen_shift) - 1);
  if (found >> plan.seen_shift == static_cast<uint32_t>(p.heads) - 1) {
    atomicExch(reinterpret_cast<uint32_t*>(p.seen + batch * p.seen_stride), position + 1);
  }
  return static_cast<int32_t>(position);
}

template <class A>
__device__ A sink_logit(const DecodeAttentionParams& p, int64_t head) {
  A logit = 0;
  switch_element(p.sinks_dtype, [&](auto element) {
    using Sink = typename decltype(element)::type;
    logit = static_cast<A>(widen(static_cast<const Sink*>(p.sinks)[head]));
  });
  return logit;
}

// What each run's exponentials are multiplied with to be probabilities, and the probability of the entry.
template <int kThreads, class T, class A, class Runs, class Scales>
__device__ void merge_softmax(const DecodeAttentionParams& p, const DecodeRow<T>& row, int runs, const Runs& memory_of,
                              const Scales& scales_of, A* shares) {
  const int group = static_cast<int>(p.group);
  FSDC_NO_UNROLL
  for (int g = threadIdx.x; g < group; g += kThreads) {
    const A sink = p.sinks == nullptr ? A{0} : sink_logit<A>(p, row.h * group + g);
    A maximum = memory_of(0).maxima[g], entry = 0, entry_logit = 0, sum = 0;
    FSDC_NO_UNROLL
    for (int run = 1; run < runs; ++run) maximum = max(maximum, memory_of(run).maxima[g]);
    if (p.sinks != nullptr) maximum = max(maximum, sink);
    if (p.skipped_count != nullptr) {
      entry_logit = memory_of(0).entry_logits[g];
      maximum = max(maximum, entry_logit);
    }
    FSDC_NO_UNROLL
    for (int run = 0; run < runs; ++run) {
      const DecodeRunMemory<A> memory = memory_of(run);
      const A scale = exponential(memory.maxima[g] - maximum);
      scales_of(run)[g] = scale;
      sum += memory.sums[g] * scale;
    }
    if (p.sinks != nullptr) sum += exponential(sink - maximum);
    if (p.skipped_count != nullptr) sum += entry = exponential(entry_logit - maximum);
    const A one_over_sum = A{1} / sum;
    FSDC_NO_UNROLL
    for (int run = 0; run < runs; ++run) scales_of(run)[g] *= one_over_sum;
    shares[g] = entry * one_over_sum;
  }
}

// [G, Dv] of the row, and the share of the entry.
template <int kThreads, class T, class A, class Runs, class Scales>
__device__ void write_output(const DecodeAttentionParams& p, const DecodeRow<T>& row, int runs, const Runs& memory_of,
                             const Scales& scales_of, const A* shares, uint32_t rank, uint32_t blocks) {
  const int group = static_cast<int>(p.group), dim = static_cast<int>(p.values.dim);
  const int count = p.skipped_count == nullptr ? 0 : p.skipped_count[row.index];
  FSDC_NO_UNROLL
  for (int i = static_cast<int>(rank) * kThreads + threadIdx.x; i < group * dim; i += blocks * kThreads) {
    const int g = i / dim;
    A sum = 0;
    FSDC_NO_UNROLL
    for (int run = 0; run < runs; ++run) {
      const A scale = scales_of(run)[g];
      if (scale != 0) sum = multiply_add(scale, memory_of(run).outputs[i], sum);
    }
    if (count > 0) {
      const A share = p.skipped_mean ? shares[g] / static_cast<A>(count) : shares[g];
      sum = multiply_add(share, static_cast<const A*>(p.skipped_values)[row.index * dim + i % dim], sum);
    }
    narrow(sum, row.output[i]);
  }
  if (p.lost != nullptr && rank == 0 && threadIdx.x == 0) {
    A lost = 0;
    FSDC_NO_UNROLL
    for (int g = 0; g < group; ++g) lost += shares[g];
    p.lost[row.index] = static_cast<float>(lost / static_cast<A>(group));
  }
}

// Scores and redundancy of the slots of one run, the thread's candidate, and what the new token received.
template <int kThreads, class T, class A>
__device__ Candidate update_slots(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row,
                                  const DecodeRun& run, const DecodeRunMemory<A>& memory, const A* scales,
                                  const EvictionRule& rule, float key_scale, float* new_received) {
  const int group = static_cast<int>(p.group);
  Candidate mine = nobody();
  FSDC_NO_UNROLL
  for (int j = threadIdx.x; j < run.tokens; j += kThreads) {
    float received = 0;
    FSDC_NO_UNROLL
    for (int g = 0; g < group; ++g) {
      received = add(received, static_cast<float>(memory.logits[g * plan.run_tokens + j] * scales[g]));
    }
    if (j == run.held) {
      *new_received = received;
      break;
    }
    const int64_t slot = run.begin + j;
    const int32_t position = row.positions[slot];
    float* const fact = row.facts + slot;
    float score = fact[kScores * p.fact_plane_stride], redundancy = fact[kRedundancy * p.fact_plane_stride];
    if (position >= 0) {
      if (is_finite(score)) {
        score = add(multiply(p.decay, score), received);
        fact[kScores * p.fact_plane_stride] = score;
      }
      if (p.redundancy > 0) {
        const float alike = static_cast<float>(memory.logits[group * plan.run_tokens + j] * key_scale);
        const float cosine = multiply(alike, fact[kKeyScales * p.fact_plane_stride]);
        if (cosine > redundancy || cosine != cosine) {
          redundancy = cosine;
          fact[kRedundancy * p.fact_plane_stride] = redundancy;
        }
      }
    }
    if (row.in_use < row.slots) continue;  // there is room: nobody goes
    mine = least(mine, rule.candidate(score, fact[kValueWeights * p.fact_plane_stride], redundancy, position, slot));
  }
  return mine;
}

// The new token into slot T while there is one, then into that of the least, whose token is added to the entry.
template <int kThreads, class T>
__device__ void put_new_token(const DecodeAttentionParams& p, const DecodeRow<T>& row, const EvictionRule& rule,
                              const RowNews& news, const NewToken& token, uint32_t blocks) {
  using A = Accumulator<T>;
  const bool is_protected = p.is_protected != nullptr && p.is_protected[row.b * p.protected_stride];
  const float score = is_protected ? std::numeric_limits<float>::infinity() : news.received;
  int64_t slot = row.in_use;
  if (row.in_use == row.slots) {
    Candidate goes = rule.candidate(score, token.weight, 0.0f, news.position, row.slots);
    FSDC_NO_UNROLL
    for (uint32_t block = 0; block < blocks; ++block) goes = least(goes, news.least[block]);
    slot = goes.slot;
    const bool is_token = static_cast<int32_t>(goes.code) >= 0;  // its position
    if (p.skipped_count != nullptr && is_token) {
      const T* const key = slot == row.slots ? row.new_key : row.keys + slot * p.keys.slot_stride;
      const T* const value = slot == row.slots ? row.new_value : row.values + slot * p.values.slot_stride;
      A* const keys = static_cast<A*>(p.skipped_keys) + row.index * p.keys.dim;
      A* const values = static_cast<A*>(p.skipped_values) + row.index * p.values.dim;
      FSDC_NO_UNROLL
      for (int64_t d = threadIdx.x; d < p.keys.dim; d += kThreads) keys[d] = add(keys[d], widen(key[d]));
      FSDC_NO_UNROLL
      for (int64_t d = threadIdx.x; d < p.values.dim; d += kThreads) values[d] = add(values[d], widen(value[d]));
      if (threadIdx.x == 0) p.skipped_count[row.index] += 1;
    }
    if (slot == row.slots) return;
  }
  // Each thread overwrites what it has added itself.
  FSDC_NO_UNROLL
  for (int64_t d = threadIdx.x; d < p.keys.dim; d += kThreads) row.keys[slot * p.keys.slot_stride + d] = row.new_key[d];
  FSDC_NO_UNROLL
  for (int64_t d = threadIdx.x; d < p.values.dim; d += kThreads) {
    row.values[slot * p.values.slot_stride + d] = row.new_value[d];
  }
  if (threadIdx.x == 0) {
    float* const fact = row.facts + slot;
    fact[kScores * p.fact_plane_stride] = score;
    fact[kValueWeights * p.fact_plane_stride] = token.weight;
    fact[kRedundancy * p.fact_plane_stride] = 0;
    fact[kKeyScales * p.fact_plane_stride] = token.key_scale;
    row.positions[slot] = news.position;
  }
}

// Padding attends to nothing.
template <int kThreads, class T>
__device__ void write_zeros(const DecodeAttentionParams& p, const DecodeRow<T>& row) {
  FSDC_NO_UNROLL
  for (int i = threadIdx.x; i < p.group * p.values.dim; i += kThreads) narrow(Accumulator<T>{0}, row.output[i]);
}

// All of it. The runs lie in the shared memory of the cluster, or at `scratch` those of a row that was split.
template <int kThreads, class T, class A>
__device__ void finish_row(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row,
                           uint32_t rank, A* scratch, A* shared, RowNews& news) {
  FSDC_SHARED(token, NewToken);
  const bool is_split = plan.phase == DecodePhase::kFinish;
  const int runs = static_cast<int>(is_split ? runs_of_head(p, plan, row.h) : plan.cluster);
  const auto memory_of = [&](int run) {
    if (is_split) return DecodeRunMemory<A>(scratch + run * plan.run.numbers, plan.run);
    A* const mine = shared + plan.shared.run;
    const uint32_t peer = static_cast<uint32_t>(run);
    return DecodeRunMemory<A>(peer == rank ? mine : cluster_map(mine, peer), plan.run);
  };
  const auto scales_of = [&](int run) {
    return is_split ? memory_of(run).maxima : shared + plan.shared.scales + run * p.group;
  };
  A* const shares = shared + plan.shared.shares;
  read_new_token<kThreads>(p, row, token);
  merge_softmax<kThreads>(p, row, runs, memory_of, scales_of, shares);
  __syncthreads();
  write_output<kThreads>(p, row, runs, memory_of, scales_of, shares, rank, plan.cluster);

  RowNews* const of_first = cluster_map(&news, 0);
  const EvictionRule rule(p, row, of_first->position);
  Candidate mine = nobody();
  FSDC_NO_UNROLL
  for (int run = static_cast<int>(rank); run < (is_split ? runs : static_cast<int>(rank) + 1); ++run) {
    mine = least(mine, update_slots<kThreads>(p, plan, row, DecodeRun(plan, run, row.in_use), memory_of(run),
                                              scales_of(run), rule, token.key_scale, &of_first->received));
  }
  mine = block_least<kThreads>(mine);
  if (threadIdx.x == 0) of_first->least[rank] = mine;
  team_sync(plan.cluster);  // after it nobody looks into a peer any more
  if (rank == 0) put_new_token<kThreads>(p, row, rule, news, token, plan.cluster);
}

}  // namespace fsdc::cuda
