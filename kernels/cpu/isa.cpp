// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fsdc::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

#if defined(__x86_64__)
static bool has_f16c() {  // __builtin_cpu_supports does not know it before clang 17
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// Linux gives a process tiles when it asks for them, and its threads too.
static bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBFloat16Tiles = 1u << 22, kTiles = 1u << 24, kBFloat16Vectors = 1u << 5;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kTiles) == 0 || (edx & kBFloat16Tiles) == 0) {
    return false;
  }
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0 || (eax & kBFloat16Vectors) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The features are those of the targets in loops_includes.h.
const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> available = [] {
    std::vector<Isa> isas;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                          __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma") && has_f16c();
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (has_amx()) isas.push_back(Isa::kAmx);
      isas.push_back(Isa::kAvx512);
    }
    if (has_avx2) isas.push_back(Isa::kAvx2);
#endif
    isas.push_back(Isa::kPortable);
    return isas;
  }();
  return available;
}

static std::atomic<Isa>& active() {
  static std::atomic<Isa> isa = available_isas().front();
  return isa;
}

Isa active_isa() { return active(); }

bool use_isa(const char* name) {
  for (const Isa isa : available_isas()) {
    if (std::strcmp(name_of(isa), name) == 0) {
      active() = isa;
      return true;
    }
  }
  return false;
}

}  // namespace fsdc::cpu
