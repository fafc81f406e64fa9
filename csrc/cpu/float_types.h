// Numbers of 16 bits, and rows of any dtype to the type of the sums. Everything is in an unnamed
// namespace: files for one instruction set include this (see CMakeLists.txt).
#pragma once

#include <stdint.h>

#include "item_table.h"

namespace {

using t4r_fast::Dtype;
using t4r_fast::Matrix;

#ifndef ALWAYS_INLINE
#define ALWAYS_INLINE inline __attribute__((always_inline))
#endif

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bfloat16(uint16_t bits) {
  return as_float(static_cast<uint32_t>(bits) << 16);
}

inline float from_float16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fff, sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  // Right for normal and denormal numbers: the exponent's bias is corrected by a multiplication.
  const float value = as_float(magnitude << 13) * 0x1p112f;
  uint32_t out;
  __builtin_memcpy(&out, &value, sizeof out);
  if (magnitude >= 0x7c00) out = 0x7f800000 | (magnitude << 13);
  return as_float(out | sign);
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits & 0x80000000;
  bits ^= sign;
  uint32_t out;
  if (bits >= 0x47800000) {  // 65536 and more, inf, nan
    out = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {  // denormal: the addition rounds at the right place
    const float shifted = as_float(bits) + 0.5f;
    __builtin_memcpy(&out, &shifted, sizeof out);
    out -= 0x3f000000;
  } else {
    out = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(out | sign >> 16);
}

// The nearest numbers of 16 bits, ties to even.
template <typename T>
void round_to_half(const T* from, Dtype dtype, int64_t count, uint16_t* out) {
  const bool brain = dtype == Dtype::kBFloat16;
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(from[i]);
    out[i] = brain ? to_bfloat16(x) : to_float16(x);
  }
}

template <typename T>
ALWAYS_INLINE void convert(const Matrix& from, int64_t offset, int64_t count, T* out) {
  switch (from.dtype) {
    case Dtype::kFloat32: {
      const float* p = static_cast<const float*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
      return;
    }
    case Dtype::kFloat64: {
      const double* p = static_cast<const double*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
      return;
    }
    case Dtype::kBFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(p[i]);
      return;
    }
    case Dtype::kFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = from_float16(p[i]);
      return;
    }
  }
}

}  // namespace
