// What csrc/cpu/activation_dropout.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "placed_rows.h"

namespace t4r_fast {

// Numbers of the plain backend's ACTIVATIONS.
enum Activation : int64_t { kNone, kGelu, kGeluTanh, kRelu, kActivations };

template <typename T>
struct ActivationRows {
  Matrix x, dy;
  Places places;
  Dropout dropout;
  const T* bias;  // whole vectors, or null
  int64_t activation, width;
  RowsOut out;  // y, or dx
  T* sums;      // of dx over each block of kSummedRows rows, row_room(width) apart; or null
  int64_t sums_stride;
};

// Rows from a multiple of kSummedRows on; `scratch` has room for four rows.
template <typename T>
struct ActivationKernels {
  void (*forward)(const ActivationRows<T>&, int64_t row, int64_t stop, T* scratch);
  void (*backward)(const ActivationRows<T>&, int64_t row, int64_t stop, T* scratch);
};

}  // namespace t4r_fast
