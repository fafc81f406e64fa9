// Products of rows with a few thousand gathered items, all in the caches: register-blocked loops
// for one instruction set. Included after simd_<set>.h.
#pragma once

#include <stdint.h>

#include "float_types.h"
#include "sampled_softmax_loss.h"

namespace {

using t4r_fast::kRowBlock;
using t4r_fast::kRowPanel;
using t4r_fast::LaneRows;

template <class X>
void pack_rows(const Matrix& from, const int64_t* source, const LaneRows<typename X::T>& to) {
  using T = typename X::T;
  constexpr int kGroup = X::kWide * X::L;
  for (int64_t i = 0; i < to.count; ++i) {
    T* row = to.rows + i * to.padded;
    convert(from, source[i] * from.stride, to.width, row);
    for (int64_t k = to.width; k < to.padded; ++k) row[k] = 0;
  }
  const int64_t lanes = (to.count + X::L - 1) / X::L * X::L;
  for (int64_t start = 0; start < lanes;) {
    const int64_t panel_rows = lanes - start / kRowPanel<T> * kRowPanel<T> < kRowPanel<T>
                                   ? lanes - start / kRowPanel<T> * kRowPanel<T>
                                   : kRowPanel<T>;
    const int64_t left = start / kRowPanel<T> * kRowPanel<T> + panel_rows - start;
    const int64_t group = left < kGroup ? left : kGroup;
    T* out = to.panels + start * to.width;
    for (int64_t r = 0; r < group; ++r) {
      const T* row = to.rows + (start + r) * to.padded;
      const bool real = start + r < to.count;
      for (int64_t k = 0; k < to.width; ++k) out[k * group + r] = real ? row[k] : 0;
    }
    start += group;
  }
}

// scores[v][row] for R items and C vectors of rows. The products are added in the order of k,
// whatever R and C are: a score does not depend on its place.
template <class X, int R, int C>
ALWAYS_INLINE void score_group(int64_t width, const typename X::T* items, int64_t stride,
                               const typename X::T* rows, typename X::T* scores,
                               int64_t scores_stride) {
  typename X::V acc[R][C];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = X::zero();
  }
  for (int64_t k = 0; k < width; ++k) {
    typename X::V b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) b[c] = X::load(rows + c * X::L);
    rows += C * X::L;
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const typename X::V a = X::set1(items[r * stride + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = X::fma(a, b[c], acc[r][c]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) X::store(scores + r * scores_stride + c * X::L, acc[r][c]);
  }
}

template <class X, int R, int C>
void score_groups(int count, int64_t width, const typename X::T* items, int64_t stride,
                  const typename X::T* rows, typename X::T* scores, int64_t scores_stride) {
  for (int v = 0; v < count; v += R) {
    score_group<X, R, C>(width, items + v * stride, stride, rows, scores + v * scores_stride,
                         scores_stride);
  }
}

// scores[v][row] of `count` items for a panel of `vectors` vectors of rows. Items and scores are
// read and written up to the next multiple of kTileUnit.
constexpr int kTileUnit = 24;

template <class X>
void score_panel(int count, int64_t width, const typename X::T* items, int64_t stride,
                 const typename X::T* panel, int vectors, typename X::T* scores,
                 int64_t scores_stride) {
  constexpr bool kLarge = X::kWide == 3;
  while (vectors > 0) {
    int used = 1;
    if (kLarge && vectors >= 3) {
      score_groups<X, kLarge ? 8 : 1, kLarge ? 3 : 1>(count, width, items, stride, panel, scores,
                                                      scores_stride);
      used = 3;
    } else if (vectors >= 2) {
      score_groups<X, kLarge ? 12 : 6, 2>(count, width, items, stride, panel, scores,
                                          scores_stride);
      used = 2;
    } else {
      score_groups<X, kLarge ? 24 : 12, 1>(count, width, items, stride, panel, scores,
                                           scores_stride);
    }
    panel += used * X::L * width;
    scores += used * X::L;
    vectors -= used;
  }
}

// out[r][column] += sum over k of a[r, k] b[k][column], R rows and C vectors of columns. The sum
// starts at 0 and not at `out`: sums of sums lose less than one long sum.
template <class X, int R, int C>
ALWAYS_INLINE void add_product_group(int64_t depth, const typename X::T* a, int64_t a_row,
                                     int64_t a_k, const typename X::T* b, int64_t b_k,
                                     typename X::T* out, int64_t out_row) {
  typename X::V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = X::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename X::V row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = X::load(b + c * X::L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename X::V x = X::set1(a[r * a_row]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = X::fma(x, row[c], acc[r][c]);
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      typename X::T* p = out + r * out_row + c * X::L;
      X::store(p, X::add(X::load(p), acc[r][c]));
    }
  }
}

template <class X, int C, int kARow, int kAK>
void add_product_columns(int64_t rows, int64_t depth, const typename X::T* a, int64_t a_stride,
                         const typename X::T* b, int64_t b_k, typename X::T* out, int64_t out_row) {
  const int64_t a_row = kARow ? kARow : a_stride, a_k = kAK ? kAK : a_stride;
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    add_product_group<X, 6, C>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                               out_row);
  }
  for (; r + 2 <= rows; r += 2) {
    add_product_group<X, 2, C>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                               out_row);
  }
  if (r < rows) {
    add_product_group<X, 1, C>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                               out_row);
  }
}

// out[rows][columns] += A b; A's element (r, k) is a[r * kARow + k * kAK], 0 standing for a_stride.
template <class X, int kARow, int kAK>
void add_product(int64_t rows, int64_t depth, int64_t columns, const typename X::T* a,
                 int64_t a_stride, const typename X::T* b, int64_t b_k, typename X::T* out,
                 int64_t out_row) {
  constexpr int kMany = X::kWide == 3 ? 4 : 2;
  int64_t column = 0;
  for (; column + kMany * X::L <= columns; column += kMany * X::L) {
    add_product_columns<X, kMany, kARow, kAK>(rows, depth, a, a_stride, b + column, b_k,
                                              out + column, out_row);
  }
  for (; column + X::L <= columns; column += X::L) {
    add_product_columns<X, 1, kARow, kAK>(rows, depth, a, a_stride, b + column, b_k, out + column,
                                          out_row);
  }
}

}  // namespace
