// What csrc/cpu/item_topk.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "item_table.h"

namespace t4r_fast {

template <typename T>
struct Candidate {
  T score;
  int64_t item;
};

template <typename T>
struct TopkScan {
  ItemTable table;
  PackedRows<T> rows;
  int64_t k;
  // Items that a row is not given, ascending: excluded[excluded_start[row], [row + 1]); or null.
  const int64_t *excluded, *excluded_start;
  int64_t padding;  // an item that no row is given, or -1
  // Per row, one set per thread: a heap of at most k, its worst on top, and what a score must
  // exceed to enter (whole vectors; -inf at first).
  Candidate<T>* best;
  int64_t* found;
  T* threshold;
};

template <typename T>
struct TopkKernels {
  int lanes;
  void (*pack)(const Matrix&, const int64_t* source, const PackedRows<T>&);
  void (*scan)(const TopkScan<T>&, int64_t tile, int64_t stop, T* scratch);
};

template <typename T>
constexpr int64_t topk_scratch(int64_t padded) {
  return kTile * (padded + kPanel<T> + 1);
}

}  // namespace t4r_fast
