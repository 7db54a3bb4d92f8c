// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together. Each of these is one exchange: every lane of the mask brings eight bytes and
// gets those of all others. None of them but __syncwarp orders memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "thread.h"

namespace simt {

struct Exchange {
  uint64_t operand[32];
  unsigned lanes;  // who took part: the mask, without lanes that a partial warp does not have
};

// Waits for every lane of the mask. They must all have come from the same place, with the same mask.
const Exchange& exchange(unsigned mask, uint64_t operand, Site site);
void warp_barrier(unsigned mask, Site site);

template <class T>
uint64_t to_operand(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "lanes exchange at most 8 bytes");
  uint64_t operand = 0;
  std::memcpy(&operand, &value, sizeof value);
  return operand;
}
template <class T>
T from_operand(uint64_t operand) {
  T value;
  std::memcpy(&value, &operand, sizeof value);
  return value;
}

// The value of lane `source`; undefined, and here 0xa5, if that one took no part.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  const Exchange& all = exchange(mask, to_operand(value), site);
  return from_operand<T>(all.lanes >> source & 1 ? all.operand[source] : 0xa5a5a5a5a5a5a5a5u);
}

// The lane that `wanted` lanes away is, if it lies within this lane's part of `width` lanes; else this lane.
inline unsigned lane_at(int wanted, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail(site, "shuffle of width %d", width);
  const int lane = static_cast<int>(running->lane());
  const int first = lane & ~(width - 1);
  return static_cast<unsigned>(wanted < first || wanted >= first + width ? lane : wanted);
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, Site site) {
  const Exchange& all = exchange(mask, to_operand(value), site);
  bool is_first = true;
  T result{};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((all.lanes >> lane & 1) == 0) continue;
    const T other = from_operand<T>(all.operand[lane]);
    result = is_first ? other : combine(result, other);
    is_first = false;
  }
  return result;
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::warp_barrier(mask, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::current()) {
  const int first = static_cast<int>(simt::running->lane()) & ~(width - 1);
  return simt::shuffle(mask, value, simt::lane_at(first + (source & (width - 1)), width, site), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, simt::Site site = simt::Site::current()) {
  const int source = static_cast<int>(simt::running->lane()) - static_cast<int>(distance);
  return simt::shuffle(mask, value, simt::lane_at(source, width, site), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, simt::Site site = simt::Site::current()) {
  const int source = static_cast<int>(simt::running->lane()) + static_cast<int>(distance);
  return simt::shuffle(mask, value, simt::lane_at(source, width, site), site);
}
// As the PTX manual has it: a lane of an earlier part can be read, one of a later part cannot.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Site site = simt::Site::current()) {
  const int lane = static_cast<int>(simt::running->lane());
  const int source = lane ^ bits;
  const bool is_earlier = source >= 0 && source < (lane & ~(width - 1));
  return simt::shuffle(mask, value, is_earlier ? static_cast<unsigned>(source) : simt::lane_at(source, width, site),
                       site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  const simt::Exchange& all = simt::exchange(mask, predicate != 0, site);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((all.lanes >> lane & 1) != 0 && all.operand[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::reduce(mask, static_cast<int>(predicate != 0), [](int a, int b) { return a | b; }, site);
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::reduce(mask, static_cast<int>(predicate != 0), [](int a, int b) { return a & b; }, site);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, simt::Site site = simt::Site::current()) {
  return simt::reduce(mask, value, [](unsigned a, unsigned b) { return a + b; }, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, simt::Site site = simt::Site::current()) {
  return simt::reduce(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; }, site);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, simt::Site site = simt::Site::current()) {
  return simt::reduce(mask, value, [](unsigned a, unsigned b) { return a < b ? b : a; }, site);
}
