// SPDX-License-Identifier: Apache-2.0
// Atomics, relaxed as in CUDA, and the fence that turns them into messages between blocks.
#pragma once

#include <type_traits>

#include "race.h"
#include "thread.h"

namespace simt {

// One CPU thread runs all: nothing can come in between. The race checker hears of it here, not from the compiler.
template <class T, class Change>
__attribute__((no_sanitize("thread"))) T change(T* address, Change new_value) {
  race::atomic(address, sizeof(T));
  const T old = *address;
  *address = new_value(old);
  return old;
}

void fence(Site site);
void poll(Site site);  // others run first; fails where for long all do nothing else

}  // namespace simt

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::change(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::change(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::change(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::change(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt::change(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return simt::change(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

inline void __threadfence(simt::Site site = simt::Site::current()) { simt::fence(site); }

// Loops that wait for another block must call it: nobody interrupts a thread.
inline void __nanosleep(unsigned, simt::Site site = simt::Site::current()) { simt::poll(site); }
