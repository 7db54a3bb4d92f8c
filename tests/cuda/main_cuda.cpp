// SPDX-License-Identifier: Apache-2.0
// The tests on a GPU; where there is none they are skipped, which is exit code 4 as in Catch2.
#include <cuda_runtime_api.h>

#include <catch2/catch_session.hpp>
#include <cstdio>

int main(int count, char** arguments) {
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
    std::printf("skipped: %s\n", cudaGetErrorString(error));
    return 4;
  }
  return Catch::Session().run(count, arguments);
}
