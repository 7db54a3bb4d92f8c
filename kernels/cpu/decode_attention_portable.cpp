// SPDX-License-Identifier: Apache-2.0
// decode_attention for any processor.
#include "kernels/cpu/attention_includes.h"

namespace fsdc::cpu::portable {

inline constexpr const char* kIsa = "portable";

#include "kernels/cpu/vectors_portable.inc"
#include "kernels/cpu/vectors.inc"
#include "kernels/cpu/decode_attention.inc"

}  // namespace fsdc::cpu::portable
