// SPDX-License-Identifier: Apache-2.0
// The loop of accumulate_scores for any processor.
#include "kernels/cpu/accumulate_scores.h"
#include "kernels/cpu/loops_includes.h"

namespace fsdc::cpu::portable {

#include "kernels/cpu/accumulate_scores.inc"

}  // namespace fsdc::cpu::portable
