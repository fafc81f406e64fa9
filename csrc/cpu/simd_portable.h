// Vectors of 16 bytes by the compiler's own vector types: for every CPU.
#pragma once

#include <stdint.h>

#include "exp_coefficients.h"
#include "float_types.h"

namespace {

template <typename Scalar, typename Int, int kMantissa>
struct PortableSimd {
  using T = Scalar;
  typedef T V __attribute__((vector_size(16)));
  typedef Int I __attribute__((vector_size(16)));
  using M = I;
  static constexpr int L = 16 / sizeof(T);
  // Tiles of scores (vectors of rows) x (items) and of products (vectors) x (rows): 12
  // accumulators, 2 vectors of B and a broadcast of A fit into 16 registers.
  static constexpr int kWide = 2;

  static V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static void stream(T* p, V v) { store(p, v); }
  static void fence() {}
  static V set1(T x) { return x - V{}; }
  static V zero() { return V{}; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V sqrt(V a) {
    for (int i = 0; i < L; ++i) {
      a[i] = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(a[i])))
                            : static_cast<T>(__builtin_sqrt(static_cast<double>(a[i])));
    }
    return a;
  }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }  // b where one is nan
  static M greater(V a, V b) { return a > b; }
  static M not_less_equal(V a, V b) { return ~(a <= b); }
  static M equal(V a, V b) { return a == b; }
  static V select(M m, V a, V b) { return m ? a : b; }
  static uint32_t bits(M m) {
    uint32_t out = 0;
    for (int i = 0; i < L; ++i) out |= static_cast<uint32_t>(m[i] & 1) << i;
    return out;
  }
  // Counts per lane: of a tile, so 32 bits are enough.
  using Count = I;
  static Count no_count() { return I{}; }
  static Count count(Count c, M m) { return c - m; }
  static void store_count(int32_t* p, Count c) {
    for (int i = 0; i < L; ++i) p[i] = static_cast<int32_t>(c[i]);
  }

  static T sum(V v) {
    T total = v[0];
    for (int i = 1; i < L; ++i) total += v[i];
    return total;
  }
  static T largest(V v) {
    T found = v[0];
    for (int i = 1; i < L; ++i) found = v[i] > found ? v[i] : found;
    return found;
  }

  // The sum of each of L vectors.
  static V sums(const V* v) {
    V out;
    for (int i = 0; i < L; ++i) out[i] = sum(v[i]);
    return out;
  }

  // a[0], b[0], a[1], b[1] ... of the lower and of the upper halves. Element by element gcc would
  // go through general registers.
  static ALWAYS_INLINE void zip(V a, V b, V* lower, V* upper) {
#ifdef __clang__
    if constexpr (L == 4) {
      *lower = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      *upper = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    } else {
      *lower = __builtin_shufflevector(a, b, 0, 2);
      *upper = __builtin_shufflevector(a, b, 1, 3);
    }
#else
    if constexpr (L == 4) {
      *lower = __builtin_shuffle(a, b, I{0, 4, 1, 5});
      *upper = __builtin_shuffle(a, b, I{2, 6, 3, 7});
    } else {
      *lower = __builtin_shuffle(a, b, I{0, 2});
      *upper = __builtin_shuffle(a, b, I{1, 3});
    }
#endif
  }

  // kColumns columns of L rows that begin at row(0), row(1) ...: a transposition.
  static constexpr int kColumns = L;
  template <class Row>
  static ALWAYS_INLINE void columns(const Row& row, V* out) {
    if constexpr (L == 4) {
      V even[2], odd[2];
      zip(load(row(0)), load(row(2)), even, even + 1);
      zip(load(row(1)), load(row(3)), odd, odd + 1);
      zip(even[0], odd[0], out, out + 1);
      zip(even[1], odd[1], out + 2, out + 3);
    } else {
      zip(load(row(0)), load(row(1)), out, out + 1);
    }
  }

  static V exp(V x) {
    using E = ExpCoefficients<T>;
    const V shifted = fma(x, set1(E::log2e), set1(E::round));
    const V n = shifted - set1(E::round);
    const V r = (x - n * set1(E::ln2_high)) - n * set1(E::ln2_low);
    V p = set1(E::c[0]);
    for (int i = 1; i < E::kTerms; ++i) p = fma(p, r, set1(E::c[i]));
    p *= (V)((I)shifted << kMantissa);
    return (V)((I)p & ~(I)(x < set1(E::least)));  // also where r is inf - inf
  }
};

using F32 = PortableSimd<float, int32_t, 23>;
using F64 = PortableSimd<double, int64_t, 52>;

// Vectors of 32-bit words in the low halves of 64 bits; what the upper halves hold is ignored.
struct W32 {
  typedef uint64_t V __attribute__((vector_size(16)));
  static constexpr int L = 2;

  static V set1(uint32_t x) { return x - V{}; }
  static V load(const uint64_t* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static V add(V a, V b) { return a + b; }
  static V product(V a, V b) { return (a & 0xffffffff) * (b & 0xffffffff); }  // of 64 bits
  static V high(V a) { return a >> 32; }
  static V exclusive_or(V a, V b, V c) { return a ^ b ^ c; }

  // Four words of each of L counters are 4 L columns. Where lane i holds counter kCounter[i], this
  // writes `factor` to p for words above `least`, else 0, in the order of columns.
  static constexpr uint64_t kCounter[L] = {0, 1};
  template <typename Factor, typename T>
  static void select(const V* w, uint32_t least, Factor factor, T* p) {
    for (int i = 0; i < 4 * L; ++i) {
      p[i] = static_cast<uint32_t>(w[i % 4][i / 4]) > least ? factor[0] : T(0);
    }
  }
};

}  // namespace
