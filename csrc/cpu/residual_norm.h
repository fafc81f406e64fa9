// What csrc/cpu/residual_norm.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "placed_rows.h"

namespace t4r_fast {

template <typename T>
struct NormRows {
  Matrix x, residual, dy;
  Places places;
  Dropout dropout;
  const T *bias, *weight, *norm_bias;  // whole vectors; bias may be null
  int64_t width;
  T eps;
};

template <typename T>
struct NormForward {
  NormRows<T> rows;
  RowsOut y;
  T *mean, *rstd;  // a number per row
};

template <typename T>
struct NormBackward {
  NormRows<T> rows;
  const T *mean, *rstd;
  RowsOut dx, dresidual;  // data of dx is null where it is dresidual
  // Over each block of kSummedRows rows, what weight, norm_bias and bias get, sums_stride / 3
  // apart; or null.
  T* sums;
  int64_t sums_stride;
};

// Buffers of a row that the kernels need.
constexpr int64_t kNormBuffers = 7;

// Rows from a multiple of kSummedRows on.
template <typename T>
struct NormKernels {
  void (*forward)(const NormForward<T>&, int64_t row, int64_t stop, T* scratch);
  void (*backward)(const NormBackward<T>&, int64_t row, int64_t stop, T* scratch);
};

}  // namespace t4r_fast
