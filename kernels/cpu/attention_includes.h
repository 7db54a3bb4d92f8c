// SPDX-License-Identifier: Apache-2.0
// What the attention operators' loops need, apart from them as loops_includes.h says why.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels/cpu/loops_includes.h"
