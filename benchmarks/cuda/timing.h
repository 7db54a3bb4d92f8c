// SPDX-License-Identifier: Apache-2.0
// Timing kernels on a GPU with a cold cache. Google Benchmark counts and reports, the GPU's own events measure.
//
// Two ways: calls captured in a graph, over as many copies of the data as exceed the L2 three times, so that what a
// call reads has been evicted since its last turn, and no launch is waited for; and single eager calls on an idle GPU
// after the L2 has been overwritten, with the launch.
#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace fsdc::bench {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, std::max<size_t>(bytes, 1))); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }

  // Random numbers, some megabytes of them over and over: zeros run faster than data does.
  void fill(const std::vector<float>& numbers) {
    size_t filled = std::min(numbers.size() * sizeof(float), bytes_);
    check(cudaMemcpy(data_, numbers.data(), filled, cudaMemcpyHostToDevice));
    for (size_t more; filled < bytes_; filled += more) {
      more = std::min(filled, bytes_ - filled);
      check(cudaMemcpy(data<char>() + filled, data_, more, cudaMemcpyDeviceToDevice));
    }
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// As accumulated attention is: over many orders of magnitude.
inline std::vector<float> heavy_tailed(size_t count) {
  std::mt19937 generator(1);
  std::lognormal_distribution<float> distribution(0, 3);
  std::vector<float> numbers(count);
  for (float& number : numbers) number = distribution(generator);
  return numbers;
}

inline size_t l2_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return static_cast<size_t>(bytes);
}

class Events {
 public:
  Events() {
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&end_));
  }
  ~Events() {
    cudaEventDestroy(start_);
    cudaEventDestroy(end_);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  template <class Work>
  double seconds(cudaStream_t stream, Work work) {
    check(cudaEventRecord(start_, stream));
    work();
    check(cudaEventRecord(end_, stream));
    check(cudaEventSynchronize(end_));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, end_));
    return double(milliseconds) * 1e-3;
  }

 private:
  cudaEvent_t start_, end_;
};

// Bytes per second, read and written, of a copy of 1 GiB on this device: what a perfect kernel is held to.
inline double copy_bandwidth() {
  static const double measured = [] {
    constexpr size_t kBytes = size_t{1} << 30;
    DeviceBuffer from(kBytes), to(kBytes);
    from.fill(heavy_tailed(1 << 20));
    Events events;
    std::vector<double> seconds(21);
    for (double& second : seconds) {
      second = events.seconds(
          nullptr, [&] { check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, nullptr)); });
    }
    std::nth_element(seconds.begin(), seconds.begin() + 10, seconds.end());
    return 2 * double(kBytes) / seconds[10];
  }();
  return measured;
}

// Calls `launch` on copy 0, 1, ... of the data.
using Launch = std::function<void(int copy, cudaStream_t stream)>;

inline int copies_for(double bytes_per_call) {
  return std::clamp(static_cast<int>(3 * double(l2_bytes()) / bytes_per_call) + 1, 1, 64);
}

inline void report(benchmark::State& state, double bytes_per_call) {
  state.counters["bytes"] = bytes_per_call;
  state.counters["bytes_per_second"] =
      benchmark::Counter(bytes_per_call, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["share_of_copy"] =
      benchmark::Counter(bytes_per_call / copy_bandwidth(), benchmark::Counter::kIsIterationInvariantRate);
}

// How every benchmark of a kernel is counted: 20 times by the GPU's own events, and that eleven times.
inline void count_by_events(benchmark::internal::Benchmark* registered) {
  registered->UseManualTime()->Unit(benchmark::kMicrosecond)->Iterations(20)->Repetitions(11);
}

inline void time_in_graph(benchmark::State& state, double bytes_per_call, int copies, const Launch& launch) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  launch(0, stream);  // what a first call does once, outside of the graph
  check(cudaStreamSynchronize(stream));
  const int calls = std::max(copies, 16) / copies * copies;  // whole turns
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int call = 0; call < calls; ++call) launch(call % copies, stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  Events events;
  for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(executable, stream));
  for (auto _ : state) {
    state.SetIterationTime(events.seconds(stream, [&] { check(cudaGraphLaunch(executable, stream)); }) / calls);
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  report(state, bytes_per_call);
}

inline void time_eagerly(benchmark::State& state, double bytes_per_call, const Launch& launch) {
  const size_t flush_bytes = 3 * l2_bytes();
  const DeviceBuffer flushed(flush_bytes);
  Events events;
  launch(0, nullptr);
  for (auto _ : state) {
    check(cudaMemsetAsync(flushed.data(), 1, flush_bytes, nullptr));
    check(cudaStreamSynchronize(nullptr));  // or the launch would hide behind the flush
    state.SetIterationTime(events.seconds(nullptr, [&] { launch(0, nullptr); }));
  }
  report(state, bytes_per_call);
}

}  // namespace fsdc::bench
