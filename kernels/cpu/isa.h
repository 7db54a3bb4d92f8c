// SPDX-License-Identifier: Apache-2.0
// The instruction sets that inner loops are compiled for; which one runs is decided once per process by what the
// processor can do. Each operator has a table of its loops per instruction set, and may lack some of the sets: then the
// next lower one runs. How an operator gets its tables: CONTRIBUTING.md.
#pragma once

#include <vector>

namespace fsdc::cpu {

// Each does all that those before it do.
enum class Isa {
  kPortable,  // any processor: SSE2 on x86-64, NEON on 64-bit Arm
  kAvx2,      // with BMI, POPCNT, FMA and F16C
  kAvx512,    // F, BW, DQ and VL
  kAmx,       // tiles of bfloat16, and AVX512_BF16
};

const char* name_of(Isa isa);

// What this processor can run, best first.
const std::vector<Isa>& available_isas();

// The best of them, unless use_isa chose another.
Isa active_isa();

// Makes the named one active; false if this processor lacks it. For tests.
bool use_isa(const char* name);

}  // namespace fsdc::cpu
