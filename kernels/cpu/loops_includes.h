// SPDX-License-Identifier: Apache-2.0
// What loops.inc needs. It stands apart because nothing but our own loops may be compiled for an instruction set that
// the processor may lack: the linker keeps one copy of an inline function, whoever compiled it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu/element.h"
#include "kernels/cpu/isa.h"

#define FSDC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FSDC_BEGIN_TARGET(features) \
  FSDC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FSDC_END_TARGET FSDC_PRAGMA(clang attribute pop)
#else
#define FSDC_BEGIN_TARGET(features) FSDC_PRAGMA(GCC push_options) FSDC_PRAGMA(GCC target(features))
#define FSDC_END_TARGET FSDC_PRAGMA(GCC pop_options)
#endif
