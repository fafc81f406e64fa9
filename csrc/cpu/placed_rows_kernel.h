// Reading, drawing and writing rows that stand for positions of sessions, for one instruction set.
// Included after simd_<set>.h.
#pragma once

#include "dropout_kernel.h"
#include "placed_rows.h"

namespace {

using t4r_fast::kSummedRows;
using t4r_fast::Places;
using t4r_fast::RowsOut;

template <class X>
constexpr int64_t whole_vectors(int64_t width) {
  return (width + X::L - 1) / X::L * X::L;
}

template <typename T>
bool holds(Dtype dtype) {
  return dtype == (sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64);
}

template <typename T>
int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kFloat64 ? 8 : 2;
}

// A row as whole vectors: where it lies, or in `copy` with zeros past the width.
template <class X>
const typename X::T* row_in(const Matrix& rows, int64_t row, int64_t width, typename X::T* copy) {
  using T = typename X::T;
  if (holds<T>(rows.dtype) && width % X::L == 0) {
    return static_cast<const T*>(rows.data) + row * rows.stride;
  }
  convert(rows, row * rows.stride, width, copy);
  for (int64_t k = width; k < whole_vectors<X>(width); ++k) copy[k] = 0;
  return copy;
}

// Where to write a row as whole vectors: where it belongs, or `copy`, which row_done puts there.
template <class X>
typename X::T* row_out(const RowsOut& rows, int64_t row, int64_t width, typename X::T* copy) {
  using T = typename X::T;
  const bool here = holds<T>(rows.dtype) && width % X::L == 0;
  return here ? static_cast<T*>(rows.data) + row * width : copy;
}

template <class X>
void row_done(const RowsOut& rows, int64_t row, int64_t width, const typename X::T* copy) {
  using T = typename X::T;
  if (!holds<T>(rows.dtype)) {
    round_to_half(copy, rows.dtype, width, static_cast<uint16_t*>(rows.data) + row * width);
  } else if (width % X::L != 0) {
    __builtin_memcpy(static_cast<T*>(rows.data) + row * width, copy,
                     static_cast<unsigned long>(width) * sizeof(T));
  }
}

template <typename T>
void row_zero(const RowsOut& rows, int64_t row, int64_t width) {
  const int64_t bytes = width * bytes_of<T>(rows.dtype);
  __builtin_memset(static_cast<char*>(rows.data) + row * bytes, 0,
                   static_cast<unsigned long>(bytes));
}

// The factors of one row after another; all 1 where nothing is drawn.
template <class X>
struct RowFactors {
  using T = typename X::T;

  RowFactors(const Dropout& dropout, const Places& places, int64_t width, T* room)
      : draws(dropout), places(places), width(width), room(room), drawn(dropout.draws) {
    for (int64_t k = 0; k < drawn_columns(width); ++k) room[k] = 1;
  }

  // Null for a row that stands for none.
  const T* of(int64_t row) const {
    const int64_t place = places.data[row * places.stride];
    if (place < 0) return nullptr;
    if (drawn) {
      const DropoutRow at{static_cast<uint32_t>(place >> 32), static_cast<uint32_t>(place), 0};
      draws.template factors<X>(at, 0, width, room);
    }
    return room;
  }

  Draws draws;
  Places places;
  int64_t width;
  T* room;
  bool drawn;
};

// A multiple of the widest vector, for the start of the next buffer.
constexpr int64_t room_of(int64_t width) {
  return (width + 63) / 64 * 64;
}

}  // namespace
