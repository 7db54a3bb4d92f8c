// SPDX-License-Identifier: Apache-2.0
// Element types: conversion, arithmetic that is never fused, vector access.
#pragma once

#include <cmath>
#include <cstring>

#include "../types.h"
#include "platform.cuh"

namespace fsdc::cuda {

// fp16, bf16 and fp32 are summed in fp32, fp64 in fp64.
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline double widen(double value) { return value; }

template <class Element>
using Accumulator = decltype(widen(Element{}));

// To the element type, to nearest, ties to even.
__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void narrow(double value, double& out) { out = value; }

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(double value) { return __double2float_rn(value); }

// nvcc may fuse a * b + c, and rounds once then; these it leaves alone.
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }

// a * b + c rounded once, and other functions, by the type of their argument.
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

__device__ inline bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// The widest access of 16, 8, 4 or 2 bytes that every address made of these numbers allows: or them together.
constexpr int access_bytes(uint64_t addresses_and_strides) {
  const uint64_t bits = addresses_and_strides | 16;
  return static_cast<int>(bits & (~bits + 1));  // lowest bit set
}

// True where elements of `bytes` may begin there.
inline bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<16> {
  using type = uint4;
};
template <>
struct AccessOf<8> {
  using type = uint2;
};
template <>
struct AccessOf<4> {
  using type = unsigned int;
};
template <>
struct AccessOf<2> {
  using type = unsigned short;
};
template <int kBytes>
using Access = typename AccessOf<kBytes>::type;

// The elements of one access.
template <class Element, int kCount>
struct Pack {
  Element items[kCount];
};
template <class Element, int kCount, class Word>
__device__ Pack<Element, kCount> unpack(const Word& word) {
  Pack<Element, kCount> pack;
  static_assert(sizeof pack == sizeof word);
  std::memcpy(&pack, &word, sizeof pack);
  return pack;
}

template <class Element, int kCount>
__device__ Access<kCount* static_cast<int>(sizeof(Element))> pack_up(const Pack<Element, kCount>& pack) {
  Access<kCount* static_cast<int>(sizeof(Element))> word;
  std::memcpy(&word, &pack, sizeof word);
  return word;
}

template <class T>
struct ElementType {
  using type = T;
};

// body(ElementType<T>{}) for the T that `dtype` names.
template <class Body>
cudaError_t with_element(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(ElementType<float>{});
    case DType::kFloat16:
      return body(ElementType<__half>{});
    case DType::kBFloat16:
      return body(ElementType<__nv_bfloat16>{});
    case DType::kFloat64:
      return body(ElementType<double>{});
  }
  return cudaErrorInvalidValue;
}

// The same inside a kernel, for what is not worth a kernel per type.
template <class Body>
__device__ void switch_element(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(ElementType<float>{});
    case DType::kFloat16:
      return body(ElementType<__half>{});
    case DType::kBFloat16:
      return body(ElementType<__nv_bfloat16>{});
    case DType::kFloat64:
      return body(ElementType<double>{});
  }
}

}  // namespace fsdc::cuda
