// SPDX-License-Identifier: Apache-2.0
// The loops of chunk_attention for any processor.
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels/cpu/chunk_attention.h"
#include "kernels/cpu/loops_includes.h"

namespace fsdc::cpu::portable {

namespace {
#include "kernels/cpu/vectors_portable.inc"
}  // namespace
#include "kernels/cpu/chunk_attention.inc"

}  // namespace fsdc::cpu::portable
