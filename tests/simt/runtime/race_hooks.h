// SPDX-License-Identifier: Apache-2.0
// Between the compiler's instrumentation and the race checker.
#pragma once

#include <cstddef>
#include <cstdint>

#include "race.h"

namespace simt::race {

using Place = const void*;                     // in the code: a return address
inline constexpr Place kEndOfBlock = nullptr;  // not in the code

void on_access(const void* address, size_t bytes, bool is_write, Place place);

// Ends the launch with an error that names both accesses.
[[noreturn]] void report_race(ThreadNumber before_thread, Place before, const char* before_did, Place now,
                              const char* now_does, uintptr_t address);

}  // namespace simt::race
