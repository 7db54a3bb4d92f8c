// SPDX-License-Identifier: Apache-2.0
// The attention of a block of decode_attention to one run of its row's tokens.
//
// Some lanes of a warp share a token, 16 bytes each: they make all its products, of the G queries and of the new key,
// from one read, and later add its value to G sums. Each thread has several such loads in flight.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cuda/prefetch.cuh"
#include "row.cuh"

namespace fsdc::cuda {

constexpr int kKeysAhead = 8;  // loads of one thread in flight: 64 KB for 512 threads

// Each of `lanes` neighbours has a part of 4 sums. Lane i gets the sum number i / (lanes / 4): halves are exchanged
// while there is more than one, so it takes 3 shuffles and some, not 4 for each.
template <class A>
__device__ A sum_over_lanes(const A (&parts)[4], int lanes) {
  const bool is_upper = (lane_index() & (lanes / 2)) != 0, is_odd = (lane_index() & (lanes / 4)) != 0;
  A half[2];
  FSDC_UNROLL
  for (int i = 0; i < 2; ++i) {
    const A sent = is_upper ? parts[i] : parts[i + 2];
    half[i] = (is_upper ? parts[i + 2] : parts[i]) + __shfl_xor_sync(kWholeWarp, sent, lanes / 2);
  }
  const A sent = is_odd ? half[0] : half[1];
  A sum = (is_odd ? half[1] : half[0]) + __shfl_xor_sync(kWholeWarp, sent, lanes / 4);
  FSDC_NO_UNROLL
  for (int distance = lanes / 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, distance);
  return sum;
}

// What the block reads later, as long as that is little: few blocks would otherwise wait for memory three times.
template <int kThreads, class T>
__device__ void prefetch_run(const DecodeAttentionParams& p, const DecodeRow<T>& row, const DecodeRun& run) {
  constexpr int kNumbers = kLineBytes / 4;
  const int lines = (static_cast<int>(p.values.dim * sizeof(T)) + kLineBytes - 1) / kLineBytes;  // of a token
  const int thread = static_cast<int>(threadIdx.x), slot = thread / lines, line = thread % lines;
  if (slot < run.held) {
    prefetch_line(row.values + (run.begin + slot) * p.values.slot_stride + line * (kLineBytes / int{sizeof(T)}));
  }
  if (thread * kNumbers < run.held) {
    const int64_t first = run.begin + thread * kNumbers;
    FSDC_NO_UNROLL
    for (int64_t plane = 0; plane < kFacts; ++plane) prefetch_line(row.facts + plane * p.fact_plane_stride + first);
    prefetch_line(row.positions + first);
  }
}

// Queries times scaling, and the new key, with zeros behind.
template <int kThreads, class T, class A>
__device__ void fill_rows(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row, A* rows) {
  constexpr int kLoads = 4;
  const int stride = static_cast<int>(plan.shared.row_stride), dim = static_cast<int>(p.keys.dim);
  const int group = static_cast<int>(p.group), count = (group + 1) * stride;
  const A scaling = static_cast<A>(p.scaling);
  FSDC_NO_UNROLL
  for (int start = threadIdx.x; start < count; start += kLoads * kThreads) {
    A loaded[kLoads];
    FSDC_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int at = start + i * kThreads, g = at / stride, d = at % stride;
      const T* const from = g < group ? row.query + g * p.query.head_stride : row.new_key;
      loaded[i] = at < count && d < dim ? widen(from[d]) : A{0};
    }
    FSDC_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int at = start + i * kThreads;
      if (at < count) rows[at] = at < group * stride ? loaded[i] * scaling : loaded[i];
    }
  }
}

// The products of all rows with each token of the run.
template <int kPack, int kThreads, class T, class A>
__device__ void multiply_keys(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row,
                              const DecodeRun& run, const A* rows, A* logits) {
  using Word = Access<sizeof(T) * kPack>;
  const int lanes = plan.key_lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int first = static_cast<int>(threadIdx.x) / lanes, step = kThreads / lanes;
  const int which = lane / (lanes / 4);  // of 4 sums, if this lane has one
  const bool has_sum = lane % (lanes / 4) == 0;
  const int stride = static_cast<int>(plan.shared.row_stride), run_tokens = static_cast<int>(plan.run_tokens);
  const int row_count = static_cast<int>(p.group) + (p.redundancy > 0 ? 1 : 0);
  FSDC_NO_UNROLL
  for (int block = 0; block < stride; block += lanes * kPack) {
    const int column = block + lane * kPack;
    const bool is_column = column < p.keys.dim;
    FSDC_NO_UNROLL
    for (int start = first; start - first < run.tokens; start += kKeysAhead * step) {
      Word keys[kKeysAhead];
      FSDC_UNROLL
      for (int i = 0; i < kKeysAhead; ++i) {
        const int j = min(start + i * step, run.tokens - 1);  // beyond, the last once more: no branch around the loads
        const T* const key = j < run.held ? row.keys + (run.begin + j) * p.keys.slot_stride : row.new_key;
        keys[i] = is_column ? *reinterpret_cast<const Word*>(key + column) : Word{};
      }
      FSDC_UNROLL
      for (int four = 0; four < kKeysAhead; four += 4) {
        A wide[4][kPack];
        FSDC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const Pack<T, kPack> key = unpack<T, kPack>(keys[four + i]);
          FSDC_UNROLL
          for (int c = 0; c < kPack; ++c) wide[i][c] = widen(key.items[c]);
        }
        const int j = start + (four + which) * step;
        const bool is_written = has_sum && j < run.tokens;
        const A* of_row = rows + column;
        A* logit = logits + j;
        FSDC_NO_UNROLL  // the registers go to the keys
            for (int r = 0; r < row_count; ++r) {
          const Pack<A, kPack> query = read_pack<kPack>(of_row);
          A parts[4] = {};
          FSDC_UNROLL
          for (int c = 0; c < kPack; ++c) {
            FSDC_UNROLL
            for (int i = 0; i < 4; ++i) parts[i] = multiply_add(query.items[c], wide[i][c], parts[i]);
          }
          const A sum = sum_over_lanes(parts, lanes);
          if (is_written) *logit = block == 0 ? sum : *logit + sum;
          of_row += stride;
          logit += run_tokens;
        }
      }
    }
  }
}

// From products to exponentials, with their maximum and sum. True if one of the run's slots is empty.
template <int kThreads, class T, class A>
__device__ bool exponentiate(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row,
                             const DecodeRun& run, A* warp_facts, const DecodeRunMemory<A>& memory) {
  constexpr int kWarps = kThreads / kWarpThreads;
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  FSDC_SHARED(has_holes, bool[kWarps]);
  A* const maxima = warp_facts;                   // [warps, G]
  A* const sums = warp_facts + kWarps * p.group;  // [warps, G]
  const int32_t* const positions = row.positions + run.begin;
  const A softcap = static_cast<A>(p.softcap);
  bool has_hole = false;
  FSDC_NO_UNROLL
  for (int g = 0; g < p.group; ++g) {
    A maximum = -kInfinity;
    FSDC_NO_UNROLL
    for (int j = threadIdx.x; j < run.tokens; j += kThreads) {
      A* const logit = memory.logits + g * plan.run_tokens + j;
      const bool is_empty = j < run.held && positions[j] < 0;
      A capped = *logit;
      if (softcap != 0) capped = softcap * hyperbolic_tangent(capped / softcap);
      if (is_empty) capped = -kInfinity;
      if (is_empty || softcap != 0) *logit = capped;
      maximum = max(maximum, capped);
      has_hole |= is_empty;
    }
    maximum = warp_max(maximum);
    if (lane_index() == 0) maxima[warp_index() * p.group + g] = maximum;
  }
  has_hole = __any_sync(kWholeWarp, has_hole);
  if (lane_index() == 0) has_holes[warp_index()] = has_hole;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) has_hole |= has_holes[warp];

  FSDC_NO_UNROLL
  for (int g = 0; g < p.group; ++g) {
    A maximum = maxima[g], sum = 0;
    for (int warp = 1; warp < kWarps; ++warp) maximum = max(maximum, maxima[warp * p.group + g]);
    const A shift = maximum == -kInfinity ? A{0} : maximum;
    FSDC_NO_UNROLL
    for (int j = threadIdx.x; j < run.tokens; j += kThreads) {
      A* const logit = memory.logits + g * plan.run_tokens + j;
      *logit = exponential(*logit - shift);
      sum += *logit;
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[warp_index() * p.group + g] = sum;
    if (threadIdx.x == 0) memory.maxima[g] = maximum;
  }
  __syncthreads();
  FSDC_NO_UNROLL
  for (int g = threadIdx.x; g < p.group; g += kThreads) {
    A sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * p.group + g];
    memory.sums[g] = sum;
  }
  return has_hole;
}

// Sums of exponentials times values. Of more than kHeads queries values are read again.
template <int kPack, int kHeads, int kThreads, class T, class A>
__device__ void add_values(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row,
                           const DecodeRun& run, bool has_holes, A* partials, const DecodeRunMemory<A>& memory) {
  using Word = Access<sizeof(T) * kPack>;
  constexpr int kWarps = kThreads / kWarpThreads, kAhead = kHeads > 4 ? 3 : 6;  // sums take the registers of loads
  const int lanes = plan.value_lanes, lane = static_cast<int>(threadIdx.x) % lanes, width = lanes * kPack;
  const int first = static_cast<int>(threadIdx.x) / lanes, step = kThreads / lanes;
  const int dim = static_cast<int>(p.values.dim), group = static_cast<int>(p.group);
  const int run_tokens = static_cast<int>(plan.run_tokens);
  const bool has_new = run.held < run.tokens;
  const T* const of_run = row.values + run.begin * p.values.slot_stride;
  const int32_t* const positions = row.positions + run.begin;
  int part = 0;  // where in `partials` [warps, width] begins, in turns with the one behind it
  FSDC_NO_UNROLL
  for (int head = 0; head < group; head += kHeads) {
    const A* const weights = memory.logits + head * run_tokens;
    const int last = group - 1 - head;  // beyond, its sums once more, which nobody reads
    FSDC_NO_UNROLL
    for (int block = 0; block < dim; block += width) {
      const int column = min(block + lane * kPack, dim - kPack);  // beyond, sums that nobody reads
      A sums[kHeads][kPack] = {};
      // The next kAhead tokens of this thread, all of them there if so it says.
      const auto add = [&](int start, auto is_full) {
        const auto token = [&](int i) { return is_full ? start + i * step : min(start + i * step, run.held - 1); };
        Word values[kAhead];
        FSDC_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          values[i] = *reinterpret_cast<const Word*>(of_run + token(i) * p.values.slot_stride + column);
        }
        FSDC_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          if (!is_full && start + i * step >= run.held) values[i] = Word{};
          if (has_holes && positions[token(i)] < 0) values[i] = Word{};
          const Pack<T, kPack> value = unpack<T, kPack>(values[i]);
          FSDC_UNROLL
          for (int g = 0; g < kHeads; ++g) {
            const A weight = weights[min(g, last) * run_tokens + token(i)];
            FSDC_UNROLL
            for (int c = 0; c < kPack; ++c) {
              sums[g][c] = multiply_add(weight, widen(value.items[c]), sums[g][c]);
            }
          }
        }
      };
      int start = first;
      for (; start + (kAhead - 1) * step < run.held; start += kAhead * step) add(start, std::true_type{});
      if (start < run.held) add(start, std::false_type{});
      FSDC_NO_UNROLL
      for (int distance = lanes; distance < kWarpThreads; distance *= 2) {
        FSDC_UNROLL
        for (int i = 0; i < kHeads * kPack; ++i) {
          A& sum = sums[i / kPack][i % kPack];
          sum += __shfl_xor_sync(kWholeWarp, sum, distance);
        }
      }
      FSDC_UNROLL
      for (int g = 0; g < kHeads; ++g) {
        if (head + g >= group) break;
        FSDC_UNROLL
        for (int c = 0; c < kPack; ++c) {
          if (lane_index() < lanes) partials[part + warp_index() * width + lane * kPack + c] = sums[g][c];
        }
        __syncthreads();
        FSDC_NO_UNROLL
        for (int c = threadIdx.x; c < min(width, dim - block); c += kThreads) {
          A sum = partials[part + c];
          for (int warp = 1; warp < kWarps; ++warp) sum += partials[part + warp * width + c];
          if (has_new) sum = multiply_add(weights[g * run_tokens + run.held], widen(row.new_value[block + c]), sum);
          memory.outputs[(head + g) * dim + block + c] = sum;
        }
        part = kWarps * width - part;
      }
    }
  }
}

// The entry's logits: q . key, and log n if it counts as n tokens; -inf while there is nothing in it.
template <int kThreads, class A>
__device__ void multiply_entry(const DecodeAttentionParams& p, const DecodeLaunch& plan, int64_t row, const A* rows,
                               A* entry_logits) {
  const int count = p.skipped_count[row];
  const A* const key = static_cast<const A*>(p.skipped_keys) + row * p.keys.dim;
  const A share = p.skipped_mean && count > 0 ? A{1} / static_cast<A>(count) : A{1};
  const A softcap = static_cast<A>(p.softcap);
  const A bias = p.skipped_mean ? logarithm(static_cast<A>(count)) : A{0};
  FSDC_NO_UNROLL
  for (int g = warp_index(); g < p.group; g += kThreads / kWarpThreads) {
    A logit = 0;
    FSDC_NO_UNROLL
    for (int d = lane_index(); d < p.keys.dim; d += kWarpThreads) {
      logit = multiply_add(rows[g * plan.shared.row_stride + d], key[d] * share, logit);
    }
    logit = warp_sum(logit);
    if (softcap != 0) logit = softcap * hyperbolic_tangent(logit / softcap);
    if (lane_index() == 0) entry_logits[g] = count == 0 ? -std::numeric_limits<A>::infinity() : logit + bias;
  }
}

// All of it; `shared` is laid out by plan.shared. The run's memory is complete after the next barrier.
template <int kPack, int kHeads, int kThreads, class T, class A>
__device__ void attend_run(const DecodeAttentionParams& p, const DecodeLaunch& plan, const DecodeRow<T>& row,
                           int64_t run_index, A* shared) {
  const DecodeRun run(plan, run_index, row.in_use);
  const DecodeRunMemory<A> memory(shared + plan.shared.run, plan.run);
  A* const rows = shared + plan.shared.rows;
  prefetch_run<kThreads>(p, row, run);
  fill_rows<kThreads>(p, plan, row, rows);
  __syncthreads();
  multiply_keys<kPack, kThreads>(p, plan, row, run, rows, memory.logits);
  if (run_index == 0 && p.skipped_count != nullptr) {
    multiply_entry<kThreads>(p, plan, row.index, rows, memory.entry_logits);
  }
  __syncthreads();
  const bool has_holes = exponentiate<kThreads>(p, plan, row, run, shared + plan.shared.warp_facts, memory);
  add_values<kPack, kHeads, kThreads>(p, plan, row, run, has_holes, shared + plan.shared.partials, memory);
}

}  // namespace fsdc::cuda
