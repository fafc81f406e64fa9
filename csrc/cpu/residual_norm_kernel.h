// residual_norm for one instruction set. Included after simd_<set>.h.
#pragma once

#include "placed_rows_kernel.h"
#include "residual_norm.h"

namespace {

using t4r_fast::NormBackward;
using t4r_fast::NormForward;
using t4r_fast::NormRows;

// dropout(x + bias) + residual
template <class X>
ALWAYS_INLINE typename X::V row_sum(const typename X::T* x, const typename X::T* bias,
                                    const typename X::T* factor, const typename X::T* residual,
                                    int64_t k) {
  typename X::V v = X::load(x + k);
  if (bias != nullptr) v = X::add(v, X::load(bias + k));
  return X::fma(v, X::load(factor + k), X::load(residual + k));
}

template <class X>
void norm_forward(const NormForward<typename X::T>& f, int64_t row, int64_t stop,
                  typename X::T* scratch) {
  using T = typename X::T;
  using V = typename X::V;
  const NormRows<T>& a = f.rows;
  const int64_t room = room_of(a.width), padded = whole_vectors<X>(a.width);
  const RowFactors<X> factors(a.dropout, a.places, a.width, scratch);
  T* const z = scratch + room;
  const T width = static_cast<T>(a.width);
  for (; row < stop; ++row) {
    const T* factor = factors.of(row);
    if (factor == nullptr) {
      row_zero<T>(f.y, row, a.width);
      f.mean[row] = f.rstd[row] = 0;
      continue;
    }
    const T* x = row_in<X>(a.x, row, a.width, scratch + 2 * room);
    const T* residual = row_in<X>(a.residual, row, a.width, scratch + 3 * room);
    T* const y = row_out<X>(f.y, row, a.width, scratch + 4 * room);
    V total = X::zero();
    for (int64_t k = 0; k < padded; k += X::L) {
      const V v = row_sum<X>(x, a.bias, factor, residual, k);
      total = X::add(total, v);
      X::store(z + k, v);
    }
    const T mean = X::sum(total) / width;
    for (int64_t k = a.width; k < padded; ++k) z[k] = mean;  // no distance from it
    const V center = X::set1(mean);
    V squares = X::zero();
    for (int64_t k = 0; k < padded; k += X::L) {
      const V d = X::sub(X::load(z + k), center);
      squares = X::fma(d, d, squares);
    }
    const V one = X::set1(1);
    T rstd[X::L];
    X::store(rstd, X::div(one, X::sqrt(X::set1(X::sum(squares) / width + a.eps))));
    const V scale = X::set1(rstd[0]);
    for (int64_t k = 0; k < padded; k += X::L) {
      const V unit = X::mul(X::sub(X::load(z + k), center), scale);
      X::store(y + k, X::fma(unit, X::load(a.weight + k), X::load(a.norm_bias + k)));
    }
    f.mean[row] = mean;
    f.rstd[row] = rstd[0];
    row_done<X>(f.y, row, a.width, y);
  }
}

template <class X>
void norm_backward(const NormBackward<typename X::T>& b, int64_t row, int64_t stop,
                   typename X::T* scratch) {
  using T = typename X::T;
  using V = typename X::V;
  const NormRows<T>& a = b.rows;
  const int64_t room = room_of(a.width), padded = whole_vectors<X>(a.width);
  const RowFactors<X> factors(a.dropout, a.places, a.width, scratch);
  T* const unit = scratch + room;
  const T width = static_cast<T>(a.width);
  T *of_weight = nullptr, *of_norm_bias = nullptr, *of_bias = nullptr;
  for (; row < stop; ++row) {
    if (b.sums != nullptr && row % kSummedRows == 0) {
      of_weight = b.sums + row / kSummedRows * b.sums_stride;
      of_norm_bias = of_weight + b.sums_stride / 3;
      of_bias = of_norm_bias + b.sums_stride / 3;
      for (int64_t k = 0; k < b.sums_stride; ++k) of_weight[k] = 0;
    }
    const T* factor = factors.of(row);
    if (factor == nullptr) {
      if (b.dx.data != nullptr) row_zero<T>(b.dx, row, a.width);
      row_zero<T>(b.dresidual, row, a.width);
      continue;
    }
    const T* x = row_in<X>(a.x, row, a.width, scratch + 2 * room);
    const T* residual = row_in<X>(a.residual, row, a.width, scratch + 3 * room);
    const T* dy = row_in<X>(a.dy, row, a.width, scratch + 4 * room);
    const V center = X::set1(b.mean[row]), scale = X::set1(b.rstd[row]);
    V first = X::zero(), second = X::zero();
    for (int64_t k = 0; k < padded; k += X::L) {
      const V z = row_sum<X>(x, a.bias, factor, residual, k);
      const V u = X::mul(X::sub(z, center), scale), d = X::load(dy + k);
      const V g = X::mul(d, X::load(a.weight + k));
      first = X::add(first, g);
      second = X::fma(g, u, second);
      X::store(unit + k, u);
      if (of_weight != nullptr) {
        X::store(of_weight + k, X::fma(d, u, X::load(of_weight + k)));
        X::store(of_norm_bias + k, X::add(d, X::load(of_norm_bias + k)));
      }
    }
    T* const dresidual = row_out<X>(b.dresidual, row, a.width, scratch + 5 * room);
    T* const dx =
        b.dx.data != nullptr ? row_out<X>(b.dx, row, a.width, scratch + 6 * room) : nullptr;
    const V mean_of_g = X::set1(X::sum(first) / width);
    const V mean_along = X::set1(X::sum(second) / width);
    for (int64_t k = 0; k < padded; k += X::L) {
      const V g = X::mul(X::load(dy + k), X::load(a.weight + k));
      const V along = X::mul(X::load(unit + k), mean_along);
      const V dz = X::mul(X::sub(X::sub(g, mean_of_g), along), scale);
      const V d = X::mul(dz, X::load(factor + k));
      X::store(dresidual + k, dz);
      if (dx != nullptr) X::store(dx + k, d);
      if (of_bias != nullptr) X::store(of_bias + k, X::add(d, X::load(of_bias + k)));
    }
    row_done<X>(b.dresidual, row, a.width, dresidual);
    if (dx != nullptr) row_done<X>(b.dx, row, a.width, dx);
  }
}

template <class X>
constexpr t4r_fast::NormKernels<typename X::T> norm_kernels() {
  return {norm_forward<X>, norm_backward<X>};
}

}  // namespace
