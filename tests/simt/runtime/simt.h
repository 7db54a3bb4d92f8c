// SPDX-License-Identifier: Apache-2.0
// CUDA for a plain C++ compiler: all that a kernel of ours may use, each thread of the grid a fiber on one CPU
// thread. For tests only. How it works, and how to add an intrinsic: docs/cuda_without_gpu.md.
#pragma once

#include "arithmetic.h"  // one thread alone: bits, rounding, loads
#include "atomics.h"     // atomics and fences
#include "blocks.h"      // barriers, shared memory, clusters
#include "launch.h"      // starting a grid
#include "warps.h"       // shuffles, votes, reductions
