// SPDX-License-Identifier: Apache-2.0
// What an operator writes must share memory with none of its other arguments, and not with itself; and all arguments
// must lie where elements of their type may.
#pragma once

#include <initializer_list>
#include <optional>

#include "csrc/checks.h"

namespace fsdc {

struct Argument {
  const char* name;
  const Tensor* tensor;  // null: not given
};

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

struct ByteRange {
  uintptr_t begin = 0, end = 0;  // empty where there is nothing
};

// The bytes from the tensor's first element to its last. Strides are not negative in torch.
inline ByteRange bytes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return {};
    last += (sizes[dim] - 1) * strides[dim];
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(tensor.element_size()))};
}

// Whether elements may share bytes: from small strides to large, each must lead beyond what the smaller ones reach.
// Elements that interleave without touching, as no operation of torch lays them out, count too.
inline bool overlaps_itself(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  bool overlaps = false;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return false;
    if (sizes[dim] == 1) continue;
    int64_t reach = 0;
    for (size_t other = 0; other < sizes.size(); ++other) {
      const bool is_smaller = strides[other] < strides[dim] || (strides[other] == strides[dim] && other > dim);
      if (is_smaller) reach += (sizes[other] - 1) * strides[other];
    }
    overlaps |= strides[dim] <= reach;
  }
  return overlaps;
}

// By the range of bytes that each spans, so views that interleave count as overlapping.
inline void check_no_overlap(const char* op, std::initializer_list<Argument> written,
                             std::initializer_list<Argument> read) {
  constexpr size_t kMost = 32;
  ByteRange ranges[kMost];
  const char* names[kMost];
  size_t count = 0;
  const auto add = [&](const Argument& argument) {
    check_aligned(op, argument.name, *argument.tensor);
    names[count] = argument.name;
    ranges[count++] = bytes_of(*argument.tensor);
  };
  for (const Argument& argument : written) {
    if (argument.tensor == nullptr) continue;
    FSDC_CHECK(!overlaps_itself(*argument.tensor), op, ": ", argument.name,
               " must not overlap itself in memory, it is written to; got strides ",
               to_text(argument.tensor->strides()), "; call .clone()");
    add(argument);
  }
  const size_t written_count = count;
  for (const Argument& argument : read) {
    if (argument.tensor != nullptr) add(argument);
  }
  for (size_t i = 0; i < written_count; ++i) {
    for (size_t j = i + 1; j < count; ++j) {
      const bool apart = ranges[i].end <= ranges[j].begin || ranges[j].end <= ranges[i].begin;
      FSDC_CHECK(apart || ranges[i].begin == ranges[i].end || ranges[j].begin == ranges[j].end, op, ": ", names[i],
                 " must share no memory with other arguments, it is written to; got one that overlaps ", names[j],
                 "; call .clone()");
    }
  }
}

}  // namespace fsdc
