// SPDX-License-Identifier: Apache-2.0
// The code of the last token that stays, found digit by digit from histograms.
//
// Nothing is sorted and no candidate is buffered: a buffer can overflow and then drops tokens silently.
#pragma once

#include "codes.cuh"

namespace fsdc::cuda {

// The code of the last kept token, as far as it had to be found out: the bits from `shift` up. Of the tokens
// with these bits the first `skip` go, because of equal scores the newer stays.
struct Threshold {
  uint32_t prefix;
  int shift;
  uint32_t skip;
};

// Counts the digits below `prefix` of this block's tokens, whose codes are taken from `floor`, lower ones as that.
// `histogram` may hold anything, and be read by nobody.
template <int kThreads, class Codes>
__device__ void count_digits(const Codes& codes, const Team& team, uint32_t floor, uint32_t prefix, int shift, int bits,
                             uint32_t* histogram) {
  constexpr int kAhead = 8;  // loads of one thread in flight
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) histogram[bin] = 0;
  __syncthreads();
  for (int64_t first = threadIdx.x; first < team.tokens; first += kThreads * kAhead) {
    const int left = clamp_to_int(team.tokens - first);
    uint32_t loaded[kAhead];
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) loaded[i] = i * kThreads < left ? codes(first + i * kThreads) : 0;
    FSDC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t digits = (max(loaded[i], floor) - floor) >> shift;
      const bool counts = i * kThreads < left && digits >> bits == prefix;
      if (counts) atomicAdd(&histogram[digits & ((1u << bits) - 1)], 1u);
    }
  }
}

// The sum of the team's histograms, in `totals`; of a block alone its own. Each block adds up some of the bins and
// hands the sums to all: a read and a write of each bin per block instead of one read per pair of blocks.
template <int kThreads>
__device__ const uint32_t* sum_over_team(const Team& team, uint32_t* histogram, uint32_t* totals) {
  team_sync(team.blocks);  // all have counted
  if (team.blocks == 1) return histogram;
  const uint32_t bins = kBins / team.blocks;
  for (uint32_t bin = team.rank * bins + threadIdx.x; bin < (team.rank + 1) * bins; bin += kThreads) {
    uint32_t total = 0;
    for (uint32_t peer = 0; peer < team.blocks; ++peer) total += cluster_map(histogram, peer)[bin];
    for (uint32_t peer = 0; peer < team.blocks; ++peer) cluster_map(totals, peer)[bin] = total;
  }
  cluster_sync();
  return totals;
}

// The digit at which `kept` tokens are reached, counted from the highest.
struct Bin {
  uint32_t digit;
  uint32_t above;  // tokens with a larger digit
  uint32_t count;
};

template <int kThreads>
__device__ Bin find_bin(const uint32_t* totals, uint32_t kept) {
  constexpr int kBinsPerThread = kBins / kThreads;
  static_assert(kBins % kThreads == 0);
  FSDC_SHARED(slots, uint32_t[kThreads / kWarpThreads]);
  FSDC_SHARED(last, Bin);
  // The bins of this thread go down from `top`, those of the threads before it lie above.
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  uint32_t mine = 0;
  for (int i = 0; i < kBinsPerThread; ++i) mine += totals[top - i];
  uint32_t above = block_exclusive_sum<kThreads>(mine, slots);
  for (int i = 0; i < kBinsPerThread; ++i) {
    const uint32_t count = totals[top - i];
    if (above < kept && kept <= above + count) last = {static_cast<uint32_t>(top - i), above, count};
    above += count;
  }
  __syncthreads();
  return last;
}

// Among the tokens with the digits found so far, on to the next digit. Counts are integers: no order, so deterministic.
// 1 <= kept < tokens of the row < 2^31. `histogram` holds the first digits where the codes are on chip.
//
// Scores are rarely negative, so digits are those of the others without their sign: 11, 10 and 10 bits, of which the
// first has the exponent and 3 bits of the mantissa. Where the threshold is not above the smallest numbers, it is found
// in the whole code: 11, 11 and 10 bits.
template <int kThreads, class Codes>
__device__ Threshold find_threshold(const Codes& codes, const Team& team, uint32_t kept, uint32_t* histogram) {
  FSDC_SHARED(totals, uint32_t[kBins]);
  Threshold threshold{0, kFirstShift, 0};
  uint32_t floor = kNotNegative;
  int bits = 11;
  for (bool is_counted = Codes::kFirstDigitIsCounted;; is_counted = false) {
    if (!is_counted) {
      count_digits<kThreads>(codes, team, floor, threshold.prefix, threshold.shift, bits, histogram);
    }
    const Bin last = find_bin<kThreads>(sum_over_team<kThreads>(team, histogram, totals), kept);
    const uint32_t sign = floor >> threshold.shift;
    floor = 0;
    if (sign != 0 && last.digit == 0) {
      threshold.shift = 32 - bits;
      continue;
    }
    threshold.prefix = threshold.prefix << bits | sign | last.digit;
    kept -= last.above;
    threshold.skip = last.count - kept;
    if (threshold.skip == 0 || threshold.shift == 0) return threshold;  // all of this digit stay, or it is the last
    bits = threshold.shift > kFirstShift ? 11 : 10;
    threshold.shift -= bits;
  }
}

}  // namespace fsdc::cuda
