// activation_dropout for one instruction set. Included after simd_<set>.h.
#pragma once

#include "activation_dropout.h"
#include "normal_coefficients.h"
#include "placed_rows_kernel.h"

namespace {

using t4r_fast::ActivationRows;

template <class X>
ALWAYS_INLINE typename X::V number(double x) {
  return X::set1(static_cast<typename X::T>(x));
}

// nan stays nan
template <class X>
ALWAYS_INLINE typename X::V magnitude(typename X::V x) {
  return X::max(X::sub(X::zero(), x), x);
}

// Phi(x), and the density phi(x).
template <class X>
ALWAYS_INLINE typename X::V normal(typename X::V x, typename X::V& density) {
  using V = typename X::V;
  using C = NormalCoefficients<typename X::T>;
  const V z = magnitude<X>(x), four = number<X>(4);
  const V bell = X::exp(X::mul(X::mul(z, z), number<X>(-0.5)));
  const V t = X::div(four, X::add(z, four));
  const V u = X::fma(t, number<X>(2), number<X>(-1));
  V p = X::set1(C::c[0]);
#pragma GCC unroll 32
  for (int i = 1; i < C::kTerms; ++i) p = X::fma(p, u, X::set1(C::c[i]));
  const V tail = X::mul(X::mul(bell, t), p);
  density = X::mul(bell, number<X>(0.3989422804014327));
  return X::select(X::greater(x, X::zero()), X::sub(number<X>(1), tail), tail);
}

// 1 / (1 + exp(-2 v)) with v = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative.
template <class X>
ALWAYS_INLINE typename X::V tanh_share(typename X::V x, typename X::V& slope) {
  using V = typename X::V;
  constexpr double kOuter = 1.5957691216057308, kInner = kOuter * 0.044715;
  const V square = X::mul(x, x), one = number<X>(1);
  const V v = X::mul(x, X::fma(square, number<X>(kInner), number<X>(kOuter)));
  const V e = X::exp(X::sub(X::zero(), magnitude<X>(v)));
  const V high = X::div(one, X::add(one, e)), low = X::mul(e, high);
  slope = X::mul(X::mul(high, low), X::fma(square, number<X>(3 * kInner), number<X>(kOuter)));
  return X::select(X::greater(x, X::zero()), high, low);
}

template <class X, int64_t kActivation>
ALWAYS_INLINE typename X::V activate(typename X::V x) {
  typename X::V unused;
  if (kActivation == t4r_fast::kGelu) return X::mul(x, normal<X>(x, unused));
  if (kActivation == t4r_fast::kGeluTanh) return X::mul(x, tanh_share<X>(x, unused));
  if (kActivation == t4r_fast::kRelu) return X::max(X::zero(), x);
  return x;
}

// dy times the activation's derivative
template <class X, int64_t kActivation>
ALWAYS_INLINE typename X::V through(typename X::V x, typename X::V dy) {
  typename X::V change;
  if (kActivation == t4r_fast::kGelu) {
    const typename X::V share = normal<X>(x, change);
    return X::mul(dy, X::fma(x, change, share));
  }
  if (kActivation == t4r_fast::kGeluTanh) {
    const typename X::V share = tanh_share<X>(x, change);
    return X::mul(dy, X::fma(x, change, share));
  }
  if (kActivation == t4r_fast::kRelu) {
    return X::select(X::not_less_equal(x, X::zero()), dy, X::zero());
  }
  return dy;
}

template <class X, int64_t kActivation>
void activation_forward(const ActivationRows<typename X::T>& a, int64_t row, int64_t stop,
                        typename X::T* scratch) {
  using T = typename X::T;
  using V = typename X::V;
  const int64_t room = room_of(a.width);
  const RowFactors<X> factors(a.dropout, a.places, a.width, scratch);
  for (; row < stop; ++row) {
    const T* factor = factors.of(row);
    if (factor == nullptr) {
      row_zero<T>(a.out, row, a.width);
      continue;
    }
    const T* x = row_in<X>(a.x, row, a.width, scratch + room);
    T* const y = row_out<X>(a.out, row, a.width, scratch + 2 * room);
    for (int64_t k = 0; k < a.width; k += X::L) {
      V v = X::load(x + k);
      if (a.bias != nullptr) v = X::add(v, X::load(a.bias + k));
      X::store(y + k, X::mul(activate<X, kActivation>(v), X::load(factor + k)));
    }
    row_done<X>(a.out, row, a.width, y);
  }
}

template <class X, int64_t kActivation>
void activation_backward(const ActivationRows<typename X::T>& a, int64_t row, int64_t stop,
                         typename X::T* scratch) {
  using T = typename X::T;
  using V = typename X::V;
  const int64_t room = room_of(a.width);
  const RowFactors<X> factors(a.dropout, a.places, a.width, scratch);
  T* sums = nullptr;
  for (; row < stop; ++row) {
    if (a.sums != nullptr && row % kSummedRows == 0) {
      sums = a.sums + row / kSummedRows * a.sums_stride;
      for (int64_t k = 0; k < whole_vectors<X>(a.width); ++k) sums[k] = 0;
    }
    const T* factor = factors.of(row);
    if (factor == nullptr) {
      row_zero<T>(a.out, row, a.width);
      continue;
    }
    const T* x = row_in<X>(a.x, row, a.width, scratch + room);
    const T* dy = row_in<X>(a.dy, row, a.width, scratch + 2 * room);
    T* const dx = row_out<X>(a.out, row, a.width, scratch + 3 * room);
    for (int64_t k = 0; k < a.width; k += X::L) {
      V v = X::load(x + k);
      if (a.bias != nullptr) v = X::add(v, X::load(a.bias + k));
      const V d = through<X, kActivation>(v, X::mul(X::load(dy + k), X::load(factor + k)));
      X::store(dx + k, d);
      if (sums != nullptr) X::store(sums + k, X::add(X::load(sums + k), d));
    }
    row_done<X>(a.out, row, a.width, dx);
  }
}

#define BY_ACTIVATION(function)                                       \
  switch (a.activation) {                                             \
    case t4r_fast::kNone:                                             \
      return function<X, t4r_fast::kNone>(a, row, stop, scratch);     \
    case t4r_fast::kGelu:                                             \
      return function<X, t4r_fast::kGelu>(a, row, stop, scratch);     \
    case t4r_fast::kGeluTanh:                                         \
      return function<X, t4r_fast::kGeluTanh>(a, row, stop, scratch); \
    case t4r_fast::kRelu:                                             \
      return function<X, t4r_fast::kRelu>(a, row, stop, scratch);     \
  }

template <class X>
void forward(const ActivationRows<typename X::T>& a, int64_t row, int64_t stop,
             typename X::T* scratch) {
  BY_ACTIVATION(activation_forward)
}

template <class X>
void backward(const ActivationRows<typename X::T>& a, int64_t row, int64_t stop,
              typename X::T* scratch) {
  BY_ACTIVATION(activation_backward)
}

#undef BY_ACTIVATION

template <class X>
constexpr t4r_fast::ActivationKernels<typename X::T> activation_kernels() {
  return {forward<X>, backward<X>};
}

}  // namespace
