// SPDX-License-Identifier: Apache-2.0
// What a file that compiles loops for one instruction set begins with. Such a file includes all that it needs before it
// names the target, and keeps its functions in an unnamed namespace: the linker keeps one copy of an inline function,
// whoever compiled it, and that copy must not be made for a processor that this one is not.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu/element.h"

#define FSDC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FSDC_BEGIN_TARGET(features) \
  FSDC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FSDC_END_TARGET FSDC_PRAGMA(clang attribute pop)
#else
#define FSDC_BEGIN_TARGET(features) FSDC_PRAGMA(GCC push_options) FSDC_PRAGMA(GCC target(features))
#define FSDC_END_TARGET FSDC_PRAGMA(GCC pop_options)
#endif

// What isa.cpp asks the processor for.
#define FSDC_BEGIN_AVX2 FSDC_BEGIN_TARGET("avx2,bmi,popcnt,fma,f16c")
#define FSDC_BEGIN_AVX512 FSDC_BEGIN_TARGET("avx2,bmi,popcnt,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FSDC_BEGIN_AMX \
  FSDC_BEGIN_TARGET("avx2,bmi,popcnt,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
