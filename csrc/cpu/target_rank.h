// What csrc/cpu/target_rank.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "item_table.h"

namespace t4r_fast {

template <typename T>
struct RankScan {
  ItemTable table;
  PackedRows<T> rows;
  const int64_t* target;  // per row
  T* own;                 // the target's score per row, whole vectors
  T inverse_temperature;  // > 0; of the sums alone
  // Per row, one set per thread, added to.
  int64_t *above, *tied, *tied_before;
  // Per row, one set per part of the items, whole vectors, or null: the sum over items of
  // exp(z - top), z = score * inverse_temperature, is added to total, and top may rise.
  T* top;
  double* total;
};

template <typename T>
struct RankKernels {
  int lanes;
  void (*pack)(const Matrix&, const int64_t* source, const PackedRows<T>&);
  // `own` of the rows [row, stop)
  void (*score_targets)(const RankScan<T>&, int64_t row, int64_t stop, T* scratch);
  void (*scan)(const RankScan<T>&, int64_t tile, int64_t stop, T* scratch);
};

template <typename T>
constexpr int64_t rank_scratch(int64_t padded) {
  return kTile * (padded + kPanel<T> + 1);
}

}  // namespace t4r_fast
