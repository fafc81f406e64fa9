// Rows that stand for positions of sessions, as kernels are given them. Plain data only, as
// item_table.h.
#pragma once

#include "dropout.h"
#include "item_table.h"

namespace t4r_fast {

// Sums over rows are made of those of blocks of so many rows, whatever the number of threads.
constexpr int64_t kSummedRows = 64;

// A negative place is that of a row that stands for none; else it is session << 32 | position.
struct Places {
  const int64_t* data;
  int64_t stride;
};

// Rows that are written, `width` numbers apart.
struct RowsOut {
  void* data;
  Dtype dtype;
};

}  // namespace t4r_fast
