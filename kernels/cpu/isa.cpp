// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstring>

namespace fsdc::cpu {

namespace portable {
extern const KernelTable kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
#endif

const std::vector<const KernelTable*>& available_kernels() {
  static const std::vector<const KernelTable*> available = [] {
    std::vector<const KernelTable*> kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                          __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      kernels.push_back(&avx512::kKernels);
    }
    if (has_avx2) kernels.push_back(&avx2::kKernels);
#endif
    kernels.push_back(&portable::kKernels);
    return kernels;
  }();
  return available;
}

static std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> kernels = available_kernels().front();
  return kernels;
}

const KernelTable& active_kernels() { return *active(); }

bool use_isa(const char* isa) {
  for (const KernelTable* kernels : available_kernels()) {
    if (std::strcmp(kernels->isa, isa) == 0) {
      active() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace fsdc::cpu
