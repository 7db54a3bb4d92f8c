// SPDX-License-Identifier: Apache-2.0
// One call of decode_attention, on the device and on the CPU's kernels.
#pragma once

#include <functional>
#include <memory>

#include "inputs.h"
#include "kernels/cpu/cpu.h"
#include "tests/cpp/kernels/decode_check.h"

namespace fsdc::test {

// What of the parameters a DecodeShape does not say.
using DecodeChange = std::function<void(DecodeAttentionParams&)>;

// Copies of a step's arrays on the device, and back.
class StepOnDevice {
 public:
  explicit StepOnDevice(DecodeStep& step) {
    for (Numbers* numbers : {&step.query, &step.new_keys, &step.new_values, &step.keys, &step.values, &step.sinks,
                             &step.output, &step.skipped_keys, &step.skipped_values}) {
      add(numbers->data(), numbers->size() * element_size(numbers->dtype()));
    }
    const auto add_vector = [&](auto& vector) {
      add(reinterpret_cast<char*>(vector.data()), int64_t(vector.size() * sizeof(vector[0])));
    };
    add_vector(step.facts), add_vector(step.lost), add_vector(step.valid), add_vector(step.is_protected);
    for (std::vector<int32_t>* numbers : {&step.positions, &step.seen, &step.skipped_count, &step.layout}) {
      add_vector(*numbers);
    }
  }

  // The same with addresses on the device.
  DecodeAttentionParams moved(DecodeAttentionParams p) const {
    const auto move = [&](auto*& address) {
      using Address = std::remove_reference_t<decltype(address)>;
      address = static_cast<Address>(const_cast<void*>(moved(static_cast<const void*>(address))));
    };
    move(p.query.data), move(p.new_keys.data), move(p.new_values.data), move(p.keys.data), move(p.values.data);
    move(p.facts), move(p.positions), move(p.seen), move(p.valid), move(p.is_protected), move(p.sinks);
    move(p.heads_layout), move(p.skipped_keys), move(p.skipped_values), move(p.skipped_count), move(p.lost);
    move(p.output);
    return p;
  }

  void copy_back() const {
    for (const Array& array : arrays_) {
      const Bytes bytes = array.on_device->copy();
      std::copy(bytes.begin(), bytes.end(), array.begin);
    }
  }

 private:
  struct Array {
    char* begin;
    int64_t bytes;
    std::unique_ptr<DeviceMemory> on_device;
  };

  void add(char* begin, int64_t bytes) {
    arrays_.push_back({begin, bytes, std::make_unique<DeviceMemory>(Bytes(begin, begin + bytes))});
  }

  const void* moved(const void* address) const {
    if (address == nullptr) return nullptr;
    for (const Array& array : arrays_) {
      const int64_t offset = static_cast<const char*>(address) - array.begin;
      if (offset >= 0 && offset < array.bytes) return array.on_device->data() + offset;
    }
    throw std::logic_error("an address of no array of the step");
  }

  std::vector<Array> arrays_;
};

inline void decode_on_device(DecodeStep& step, const cuda::DecodePlan& plan, const DecodeChange& change = nullptr) {
  DecodeAttentionParams params = step.params();
  if (change) change(params);
  const StepOnDevice on_device(step);
  decode_attention(on_device.moved(params), plan);
  on_device.copy_back();
}

// Equal but for the rounding of sums: what is copied has the same bits.
inline void require_same_step(DecodeStep& step, DecodeStep& expected) {
  const auto is_close = [](double a, double b, double relative, double absolute) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
    return a == b || std::abs(a - b) <= absolute + relative * std::max(std::abs(a), std::abs(b));
  };
  REQUIRE(step.positions == expected.positions);
  REQUIRE(step.seen == expected.seen);
  REQUIRE(step.skipped_count == expected.skipped_count);
  REQUIRE(step.keys == expected.keys);
  REQUIRE(step.values == expected.values);
  const size_t plane = step.facts.size() / kFacts + 1;  // the last slot of the last one is not there
  for (size_t i = 0; i < step.facts.size(); ++i) {
    const size_t slot = i % plane;
    const bool is_empty = slot < step.positions.size() && step.positions[slot] < 0;
    if (is_empty && i >= plane) continue;  // of an empty slot only the score means anything
    CAPTURE(i, step.facts[i], expected.facts[i]);
    REQUIRE(is_close(step.facts[i], expected.facts[i], 5e-6, 2e-6));
  }
  for (size_t i = 0; i < step.lost.size(); ++i) REQUIRE(is_close(step.lost[i], expected.lost[i], 5e-6, 1e-6));
  for (int64_t i = 0; i < step.skipped_keys.size(); ++i) REQUIRE(step.skipped_keys[i] == expected.skipped_keys[i]);
  for (int64_t i = 0; i < step.skipped_values.size(); ++i) {
    REQUIRE(step.skipped_values[i] == expected.skipped_values[i]);
  }
  for (int64_t i = 0; i < step.output.size(); ++i) {
    CAPTURE(i, step.output[i], expected.output[i]);
    REQUIRE(is_close(step.output[i], expected.output[i], tolerance(step.is.dtype), tolerance(step.is.dtype)));
  }
}

}  // namespace fsdc::test
