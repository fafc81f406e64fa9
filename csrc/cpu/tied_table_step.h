// What csrc/cpu/tied_table_step.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "tied_softmax_loss.h"

namespace t4r_fast {

// Everything that the gradient of a table is made of.
template <typename T>
struct TableGradient {
  ItemTable table;
  int64_t padded;
  const LossBackward<T>* softmax;  // each with its own bias, rows and options
  int64_t softmax_count;
  const int64_t* ids;  // (lookups,), sorted
  const T* rows;       // (lookups, width)
  int64_t lookups;
  Matrix formed;  // data is null without a gradient formed elsewhere
};

// The codes of t4r_fast/plain/tied_table_step.py.
enum Kind : int64_t { kSgd, kAdagrad, kAdamw, kRowwiseAdagrad, kRowwiseAdamw, kKinds };

template <typename T>
struct TableRule {
  int64_t kind, step;
  double lr, beta1, beta2, eps, weight_decay, momentum, scale;
  void* items;  // contiguous, of the table's dtype
  T* first;     // (V, D), or (V,) for row-wise Adagrad; or null
  T* second;    // (V, D), or (V,) for row-wise AdamW; or null
};

// Steps that rows missed: base + 1 to base + steps.
struct MissedSteps {
  int32_t* last;       // (V,), the step each row is at
  const int64_t* ids;  // sorted and different; or null for all rows
  int64_t base, steps;
  const double* lrs;        // (steps,)
  const double* log_decay;  // (steps + 1,)
  double highest_lr;
};

template <typename T>
struct TableKernels {
  int lanes;
  void (*pack)(const Matrix&, const int64_t* source, const PackedRows<T>&);
  void (*step)(const TableGradient<T>&, const TableRule<T>&, int64_t tile, int64_t stop,
               T* scratch);
  // squares[tile] becomes the sum of squares of the tile's gradient
  void (*norm)(const TableGradient<T>&, double* squares, int64_t tile, int64_t stop, T* scratch);
  // the lookups [at, stop), which begin and end with an id
  void (*rows)(const TableGradient<T>&, const TableRule<T>&, int64_t at, int64_t stop, T* scratch);
  void (*catch_up)(const ItemTable&, const TableRule<T>&, const MissedSteps&, int64_t at,
                   int64_t stop, T* scratch);
};

template <typename T>
constexpr int64_t table_scratch(int64_t padded) {
  return kTile * (2 * padded + kBlockStride<T> + 2) + 4 * padded;
}

}  // namespace t4r_fast
