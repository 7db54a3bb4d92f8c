// SPDX-License-Identifier: Apache-2.0
// What a launch that must fail says.
#pragma once

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <string>

#include "../schedules.h"
#include "kernels/cuda/platform.cuh"

namespace simt {

inline std::string error_of(const Grid& grid, const std::function<void()>& kernel) {
  try {
    run_grid(grid, kernel);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// "file:line" of the line so many below the calling one, as errors name it.
inline std::string line(unsigned below, Site site = Site::current()) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line() + below);
}

using Catch::Matchers::ContainsSubstring;

}  // namespace simt
