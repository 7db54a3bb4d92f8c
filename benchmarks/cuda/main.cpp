// SPDX-License-Identifier: Apache-2.0
// Without a GPU it says so and exits with 3, as tests/gpu/run does.
#include "timing.h"

int main(int count, char** arguments) {
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 2;
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
    std::fprintf(stderr, "bench_cuda: there is no GPU: %s\n", cudaGetErrorString(error));
    return 3;
  }
  cudaDeviceProp properties;
  fsdc::bench::check(cudaGetDeviceProperties(&properties, 0));
  benchmark::AddCustomContext("gpu", properties.name);
  benchmark::AddCustomContext("copy_bytes_per_second", std::to_string(fsdc::bench::copy_bandwidth()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
