// What csrc/cpu/sampled_softmax_loss.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "item_table.h"

namespace t4r_fast {

// Items scored against rows, gathered: (count rounded up to kTile, padded), zeros past the
// width and past count.
template <typename T>
struct Candidates {
  const T* items;
  const T* shift;  // z = dot * inverse_temperature - shift
  int64_t count;
};

// Negatives that are the target of a row: its logit becomes `value`, which is constant; or, with
// `add`, it grows by add[row].
template <typename T>
struct Hits {
  const int64_t* place;  // per row the candidate, negative: none
  const T* add;
  T value;
};

template <typename T>
struct SampledForward {
  PackedRows<T> rows;
  Candidates<T> candidates;
  Hits<T> hits;
  T inverse_temperature;
  // Per row: sum over candidates of exp(z - top), and of exp(z - top) * item (padded) or null.
  T* top;
  double* total;
  T* mean;
};

template <typename T>
struct SampledBackward {
  PackedRows<T> rows;
  Candidates<T> candidates;
  Hits<T> hits;
  T inverse_temperature;
  const T *shift, *weight;  // dz = weight exp(z - shift), per row, whole vectors
  // Per candidate: row of ditems, and exp of what rounding added to `shift`, which would be off in
  // one direction for all rows.
  const int64_t* place;
  const T* factor;
  T* ditems;      // contiguous, added to
  double* dbias;  // added to, or null
};

// Some candidates of one row, which has them to itself.
template <typename T>
struct RowForward {
  const T *hidden, *items, *shift;
  int64_t count, padded;
  T inverse_temperature;
  T* z;  // kTile entries; in: added to the logit, -inf takes a candidate out; out: weights
  T* top;
  double* total;
  T *mean, *spare;  // (padded) or null; (padded)
};

// The rows that drew one item. ditem (padded) is zero before.
template <typename T>
struct RowBackward {
  const T *item, *rows;  // rows: (N, padded)
  const int64_t* row;
  int64_t count, padded;
  T inverse_temperature;
  const T *shift, *weight;  // per row of `rows`
  const T* lower;           // per entry: what z is lowered by; +inf takes it out
  T factor;                 // of all of them, as in SampledBackward
  T *ditem, *spare;         // spare: (padded)
  double* dbias;            // one number
};

template <typename T>
struct SampledKernels {
  int lanes;
  void (*pack)(const Matrix&, const int64_t* source, const PackedRows<T>&);
  void (*gather)(const Matrix&, const int64_t* ids, int64_t count, int64_t width, int64_t padded,
                 T* out);
  void (*forward)(const SampledForward<T>&, int64_t first, int64_t stop, T* scratch);
  void (*backward)(const SampledBackward<T>&, T* scratch);
  void (*row_forward)(const RowForward<T>&);
  void (*row_backward)(const RowBackward<T>&);
};

template <typename T>
constexpr int64_t sampled_scratch(int64_t padded) {
  return kTile * (padded + kBlockStride<T>);
}

}  // namespace t4r_fast
