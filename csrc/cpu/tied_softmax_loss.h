// What csrc/cpu/tied_softmax_loss.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "item_table.h"

namespace t4r_fast {

// The target of a row that takes part; sorted by (item / kTile, row).
struct Target {
  int64_t item, row;
};

// Scores that forward keeps for backward, of `tiles` tiles spread evenly over all `of`, so that
// threads have equally many. For each tile panels of rows, side by side: [item][row of the panel].
template <typename T>
struct Stash {
  T* data = nullptr;
  int64_t tiles = 0, of = 1;
  int64_t rows = 0, first = 0;  // whole vectors of all rows, and which of them come first here
};

template <typename T>
struct LossForward {
  ItemTable table;
  PackedRows<T> rows;
  const Target* targets;
  T inverse_temperature, softcap;
  Stash<T> stash;  // written
  // Per row, one set per thread: sum over items of exp(z - top) and, if not null, of z.
  T* top;
  double *total, *z_sum;
  // (rows.count, rows.padded), one per thread: sum over items but the target of exp(z - top) item,
  // times the slope of the softcap; or null.
  T* mean;
  double* target_score;  // per row, shared: one thread meets the row's target
};

template <typename T>
struct LossBackward {
  ItemTable table;
  PackedRows<T> rows;
  const Target* targets;
  T inverse_temperature, softcap;
  Stash<T> stash;  // read
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

// Tiles that are worked on together, rows inside: rows of hidden and their gradient, too many for
// the second-level cache, come from the third once for all of them.
constexpr int kTiles = 4;
template <typename T>
constexpr int64_t tiles_together(int64_t padded) {
  // The items of a tile and their gradient; half of a cache of 1 MiB leaves room for the rows.
  const int64_t bytes = 2 * kTile * padded * static_cast<int64_t>(sizeof(T));
  const int64_t fit = (int64_t{400} << 10) / bytes;
  return fit < 1 ? 1 : fit < kTiles ? fit : kTiles;
}

template <typename T>
constexpr int64_t loss_scratch(int64_t padded) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  return kTile * (padded + kBlockStride<T> + tiles_together<T>(padded) * (2 * padded + 1 + kLanes));
}

}  // namespace t4r_fast
