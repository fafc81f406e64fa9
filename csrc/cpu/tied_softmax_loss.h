// What csrc/cpu/tied_softmax_loss.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "item_table.h"

namespace t4r_fast {

// The target of a row that takes part; sorted by (item / kTile, row).
struct Target {
  int64_t item, row;
};

template <typename T>
struct LossForward {
  ItemTable table;
  PackedRows<T> rows;
  const Target* targets;
  T inverse_temperature, softcap;
  // Per row, one set per thread: sum over items of exp(z - top) and, if not null, of z.
  T* top;
  double *total, *z_sum;
  double* target_score;  // per row, shared: one thread meets the row's target
};

template <typename T>
struct LossBackward {
  ItemTable table;
  PackedRows<T> rows;
  const Target* targets;
  T inverse_temperature, softcap;
  // dz = weight exp(z - shift) + constant, + share at the target; whole vectors of rows
  const T *shift, *weight, *constant, *share;
  T* drows;      // (rows.count, rows.padded), one per thread, added to; or null
  void* ditems;  // contiguous, of the table's dtype, written once, or added to; or null
  T* dbias;      // (V,), the same
  bool add;
};

template <typename T>
struct LossKernels {
  int lanes;
  void (*pack)(const Matrix&, const int64_t* source, const PackedRows<T>&);
  void (*forward)(const LossForward<T>&, int64_t tile, int64_t stop, T* scratch);
  void (*backward)(const LossBackward<T>&, int64_t tile, int64_t stop, T* scratch);
};

template <typename T>
constexpr int64_t loss_scratch(int64_t padded) {
  return kTile * (3 * padded + kBlockStride<T> + 2 + kPanel<T>);
}

}  // namespace t4r_fast
