// Vectors of 32 bytes, AVX2 and FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "exp_coefficients.h"
#include "float_types.h"

namespace {

struct F32 {
  using T = float;
  using V = __m256;
  using M = __m256;
  static constexpr int L = 8;
  static constexpr int kWide = 2;  // 6 x 2 accumulators, 2 of B, 1 of A: 15 of 16 registers

  static V load(const T* p) { return _mm256_loadu_ps(p); }
  static void store(T* p, V v) { _mm256_storeu_ps(p, v); }
  static void stream(T* p, V v) { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static V set1(T x) { return _mm256_set1_ps(x); }
  static V zero() { return _mm256_setzero_ps(); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where one is nan
  static M greater(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static M not_less_equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
  static M equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static V select(M m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
  static uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }

  // Counts per lane: of a tile, so 32 bits are enough.
  using Count = __m256i;
  static Count no_count() { return _mm256_setzero_si256(); }
  static Count count(Count c, M m) { return _mm256_sub_epi32(c, _mm256_castps_si256(m)); }
  static void store_count(int32_t* p, Count c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), c);
  }

  static T sum(V v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static T largest(V v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  // The sum of each of L vectors, by one tree for all of them.
  static ALWAYS_INLINE V sums(const V* v) {
    V four[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const V* p = v + 4 * i;
      const V x = add(_mm256_unpacklo_ps(p[0], p[1]), _mm256_unpackhi_ps(p[0], p[1]));
      const V y = add(_mm256_unpacklo_ps(p[2], p[3]), _mm256_unpackhi_ps(p[2], p[3]));
      four[i] = add(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
    }
    return add(_mm256_permute2f128_ps(four[0], four[1], 0x20),
               _mm256_permute2f128_ps(four[0], four[1], 0x31));
  }

  // kColumns columns of L rows that begin at row(0), row(1) ...: a transposition. Loads of 16 bytes
  // from two rows put them where the shuffles need them.
  static constexpr int kColumns = 4;
  template <class Row>
  static ALWAYS_INLINE void columns(const Row& row, V* out) {
    V rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row(i))),
                                     _mm_loadu_ps(row(i + 4)), 1);
    }
    const V a = _mm256_unpacklo_ps(rows[0], rows[1]), b = _mm256_unpacklo_ps(rows[2], rows[3]);
    const V c = _mm256_unpackhi_ps(rows[0], rows[1]), d = _mm256_unpackhi_ps(rows[2], rows[3]);
    out[0] = _mm256_shuffle_ps(a, b, 0x44);
    out[1] = _mm256_shuffle_ps(a, b, 0xee);
    out[2] = _mm256_shuffle_ps(c, d, 0x44);
    out[3] = _mm256_shuffle_ps(c, d, 0xee);
  }

  static V exp(V x) {
    using E = ExpCoefficients<T>;
    const V shifted = fma(x, set1(E::log2e), set1(E::round));
    const V n = sub(shifted, set1(E::round));
    V r = _mm256_fnmadd_ps(n, set1(E::ln2_high), x);
    r = _mm256_fnmadd_ps(n, set1(E::ln2_low), r);
    V p = set1(E::c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < E::kTerms; ++i) p = fma(p, r, set1(E::c[i]));
    p = mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
    // 0 below the least normal number, also where r is inf - inf
    return _mm256_and_ps(p, _mm256_cmp_ps(x, set1(E::least), _CMP_NLT_UQ));
  }
};

struct F64 {
  using T = double;
  using V = __m256d;
  using M = __m256d;
  static constexpr int L = 4;
  static constexpr int kWide = 2;

  static V load(const T* p) { return _mm256_loadu_pd(p); }
  static void store(T* p, V v) { _mm256_storeu_pd(p, v); }
  static void stream(T* p, V v) { _mm256_stream_pd(p, v); }
  static void fence() { _mm_sfence(); }
  static V set1(T x) { return _mm256_set1_pd(x); }
  static V zero() { return _mm256_setzero_pd(); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  static V div(V a, V b) { return _mm256_div_pd(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_pd(a); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static M greater(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
  static M not_less_equal(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_NLE_UQ); }
  static M equal(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static V select(M m, V a, V b) { return _mm256_blendv_pd(b, a, m); }
  static uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_pd(m)); }

  using Count = __m256i;
  static Count no_count() { return _mm256_setzero_si256(); }
  static Count count(Count c, M m) { return _mm256_sub_epi64(c, _mm256_castpd_si256(m)); }
  static void store_count(int32_t* p, Count c) {
    int64_t wide[L];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide), c);
    for (int i = 0; i < L; ++i) p[i] = static_cast<int32_t>(wide[i]);
  }

  static T sum(V v) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static T largest(V v) {
    const __m128d half = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)));
  }

  static ALWAYS_INLINE V sums(const V* v) {
    const V x = add(_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpackhi_pd(v[0], v[1]));
    const V y = add(_mm256_unpacklo_pd(v[2], v[3]), _mm256_unpackhi_pd(v[2], v[3]));
    return add(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
  }

  static constexpr int kColumns = 2;
  template <class Row>
  static ALWAYS_INLINE void columns(const Row& row, V* out) {
    V rows[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      rows[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(row(i))),
                                     _mm_loadu_pd(row(i + 2)), 1);
    }
    out[0] = _mm256_unpacklo_pd(rows[0], rows[1]);
    out[1] = _mm256_unpackhi_pd(rows[0], rows[1]);
  }

  static V exp(V x) {
    using E = ExpCoefficients<T>;
    const V shifted = fma(x, set1(E::log2e), set1(E::round));
    const V n = sub(shifted, set1(E::round));
    V r = _mm256_fnmadd_pd(n, set1(E::ln2_high), x);
    r = _mm256_fnmadd_pd(n, set1(E::ln2_low), r);
    V p = set1(E::c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < E::kTerms; ++i) p = fma(p, r, set1(E::c[i]));
    p = mul(p, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52)));
    return _mm256_and_pd(p, _mm256_cmp_pd(x, set1(E::least), _CMP_NLT_UQ));
  }
};

// Vectors of 32-bit words in the low halves of 64 bits; what the upper halves hold is ignored.
struct W32 {
  using V = __m256i;
  static constexpr int L = 4;

  static V set1(uint32_t x) { return _mm256_set1_epi64x(x); }
  static V load(const uint64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static V product(V a, V b) { return _mm256_mul_epu32(a, b); }  // of 64 bits
  static V high(V a) { return _mm256_srli_epi64(a, 32); }
  static V exclusive_or(V a, V b, V c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

  // Four words of each of L counters are 4 L columns. Where lane i holds counter kCounter[i], this
  // writes `factor` to p for words above `least`, else 0, in the order of columns.
  static constexpr uint64_t kCounter[L] = {0, 2, 1, 3};
  static ALWAYS_INLINE void select(const V* w, uint32_t least, F32::V factor, float* p) {
    V v[2];
    in_order(w, least, v);
    for (int i = 0; i < 2; ++i) {
      _mm256_storeu_ps(p + 8 * i, _mm256_and_ps(_mm256_castsi256_ps(v[i]), factor));
    }
  }
  static ALWAYS_INLINE void select(const V* w, uint32_t least, F64::V factor, double* p) {
    V v[2];
    in_order(w, least, v);
    for (int i = 0; i < 2; ++i) {
      const V first = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v[i]));
      const V last = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v[i], 1));
      _mm256_storeu_pd(p + 8 * i, _mm256_and_pd(_mm256_castsi256_pd(first), factor));
      _mm256_storeu_pd(p + 8 * i + 4, _mm256_and_pd(_mm256_castsi256_pd(last), factor));
    }
  }

 private:
  // All bits set where a word is above `least`.
  static ALWAYS_INLINE void in_order(const V* w, uint32_t least, V* out) {
    const V low = _mm256_blend_epi32(w[0], _mm256_slli_epi64(w[1], 32), 0xaa);
    const V top = _mm256_blend_epi32(w[2], _mm256_slli_epi64(w[3], 32), 0xaa);
    // signed numbers compare as unsigned ones do once the top bits are turned
    const V sign = _mm256_set1_epi32(INT32_MIN);
    const V limit = _mm256_set1_epi32(static_cast<int>(least ^ 0x80000000));
    out[0] = _mm256_cmpgt_epi32(_mm256_xor_si256(_mm256_unpacklo_epi64(low, top), sign), limit);
    out[1] = _mm256_cmpgt_epi32(_mm256_xor_si256(_mm256_unpackhi_epi64(low, top), sign), limit);
  }
};

}  // namespace
