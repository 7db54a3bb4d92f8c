// SPDX-License-Identifier: Apache-2.0
// What every argument rule is made of. An error has one form, `op: argument must be <rule>; got <what came>`, and is
// a RuntimeError in Python, as from torch. For fake kernels python/fixed_size_kv_cache/operators/checks.py holds the
// same rules.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/types.h"

namespace fsdc {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A macro, so that the parts of the text are made only when it is needed.
#define FSDC_CHECK(satisfied, ...) \
  if (satisfied) [[likely]] {      \
  } else                           \
    ::fsdc::fail(__VA_ARGS__)

// [2, 8, 100, 64]
inline std::string to_text(IntHeaderOnlyArrayRef numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  return text + "]";
}

// As Python prints it, without `torch.`
inline std::string to_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {  // Float8_e4m3fn and the like
      std::string name = torch::headeronly::toString(type);
      name[0] = static_cast<char>(std::tolower(name[0]));
      return name;
    }
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.get_device_index());
  return tensor.is_cuda() ? "cuda:" + index : "device " + index;
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

inline DType to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return DType::kFloat32;
  }
}

// Python's None comes as a tensor that is not defined.
inline void check_given(const char* op, const char* name, const Tensor& tensor) {
  FSDC_CHECK(tensor.defined(), op, ": ", name, " must be a tensor; got None");
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank, const char* shape) {
  check_given(op, name, tensor);
  FSDC_CHECK(tensor.dim() == rank, op, ": ", name, " must be ", shape, "; got sizes ", to_text(tensor.sizes()));
}

// All sizes at once; `shape` names them.
inline void check_sizes(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                        const char* shape) {
  check_given(op, name, tensor);
  const auto have = tensor.sizes();
  FSDC_CHECK(std::equal(have.begin(), have.end(), sizes.begin(), sizes.end()), op, ": ", name, " must be ", shape,
             " = ", to_text(IntHeaderOnlyArrayRef(sizes.begin(), sizes.size())), "; got sizes ", to_text(have));
}

inline void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  FSDC_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", to_text(type), "; got ",
             to_text(tensor.scalar_type()));
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  FSDC_CHECK(is_supported(tensor.scalar_type()), op, ": ", name, " must be float32, float16, bfloat16 or float64; got ",
             to_text(tensor.scalar_type()));
}

inline void check_float32(const char* op, const char* name, const Tensor& tensor) {
  FSDC_CHECK(tensor.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32; got ",
             to_text(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  FSDC_CHECK(device_text(tensor) == device_text(other), op, ": ", name, " must be on the device of ", other_name, ", ",
             device_text(other), "; got ", device_text(tensor));
}

inline void check_contiguous_rows(const char* op, const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  FSDC_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, op, ": ", name,
             " must have a contiguous last dimension; got strides ", to_text(tensor.strides()), "; call .contiguous()");
}

inline void check_like_query(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  FSDC_CHECK(tensor.scalar_type() == query.scalar_type(), op, ": ", name, " must have the type of query, ",
             to_text(query.scalar_type()), "; got ", to_text(tensor.scalar_type()));
  check_contiguous_rows(op, name, tensor);
}

// Torch's own tensors are; those of torch.frombuffer need not be.
inline void check_aligned(const char* op, const char* name, const Tensor& tensor) {
  const uintptr_t size = static_cast<uintptr_t>(tensor.element_size());
  const uintptr_t beyond = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % size;
  FSDC_CHECK(beyond == 0, op, ": ", name, " must lie at a multiple of ", size, " bytes, the size of its elements; got ",
             beyond, " more; call .clone()");
}

inline void check_tokens(const char* op, const char* name, int64_t tokens) {
  FSDC_CHECK(tokens < int64_t{1} << 31, op, ": ", name, " must have fewer than 2147483648 tokens; got ", tokens);
}

// Attention weights [B, Hq, Q, S] of the heads of `heads` groups.
inline void check_weights(const char* op, const char* name, const Tensor& weights, int64_t batch, int64_t heads,
                          int64_t tokens) {
  FSDC_CHECK(weights.size(0) == batch && weights.size(3) == tokens, op, ": ", name,
             " must be [B, Hq, Q, S] with B = ", batch, " and S = ", tokens, "; got sizes ", to_text(weights.sizes()));
  const int64_t query_heads = weights.size(1);
  FSDC_CHECK(heads == 0 ? query_heads == 0 : query_heads > 0 && query_heads % heads == 0, op, ": ", name,
             " must have a multiple of the ", heads, " KV heads; got ", query_heads, " heads");
}

}  // namespace fsdc
