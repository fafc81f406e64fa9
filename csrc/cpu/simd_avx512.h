// Vectors of 64 bytes, AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "exp_coefficients.h"
#include "float_types.h"

namespace {

struct F32 {
  using T = float;
  using V = __m512;
  using M = __mmask16;
  static constexpr int L = 16;
  static constexpr int kWide = 3;  // 8 x 3 accumulators, 3 of B, 1 of A: 28 of 32 registers

  static V load(const T* p) { return _mm512_loadu_ps(p); }
  static void store(T* p, V v) { _mm512_storeu_ps(p, v); }
  static void stream(T* p, V v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static V set1(T x) { return _mm512_set1_ps(x); }
  static V zero() { return _mm512_setzero_ps(); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where one is nan
  static M greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M not_less_equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static M equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
  static uint32_t bits(M m) { return m; }

  // Counts per lane: of a tile, so 32 bits are enough.
  using Count = __m512i;
  static Count no_count() { return _mm512_setzero_si512(); }
  static Count count(Count c, M m) { return _mm512_mask_add_epi32(c, m, c, _mm512_set1_epi32(1)); }
  static void store_count(int32_t* p, Count c) { _mm512_storeu_si512(p, c); }

  static T sum(V v) { return _mm512_reduce_add_ps(v); }
  static T largest(V v) { return _mm512_reduce_max_ps(v); }

  // The sum of each of L vectors, by one tree for all of them.
  static ALWAYS_INLINE V sums(const V* v) {
    V four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V* p = v + 4 * i;
      const V x = add(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1]));
      const V y = add(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
      four[i] = add(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    }
    const V x = halves(four[0], four[1]), y = halves(four[2], four[3]);
    return halves(x, y);
  }

  // The even 128 bits plus the odd ones, of a, then of b.
  static ALWAYS_INLINE V halves(V a, V b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  // kColumns columns of L rows that begin at row(0), row(1) ...: a transposition. Loads of 16 bytes
  // from four rows put them where the shuffles need them.
  static constexpr int kColumns = 4;
  template <class Row>
  static ALWAYS_INLINE void columns(const Row& row, V* out) {
    V rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_insertf32x8(_mm512_castps256_ps512(halves(row(i), row(i + 4))),
                                   halves(row(i + 8), row(i + 12)), 1);
    }
    const V a = _mm512_unpacklo_ps(rows[0], rows[1]), b = _mm512_unpacklo_ps(rows[2], rows[3]);
    const V c = _mm512_unpackhi_ps(rows[0], rows[1]), d = _mm512_unpackhi_ps(rows[2], rows[3]);
    out[0] = _mm512_shuffle_ps(a, b, 0x44);
    out[1] = _mm512_shuffle_ps(a, b, 0xee);
    out[2] = _mm512_shuffle_ps(c, d, 0x44);
    out[3] = _mm512_shuffle_ps(c, d, 0xee);
  }

  static ALWAYS_INLINE __m256 halves(const T* low, const T* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }

  static V exp(V x) {
    using E = ExpCoefficients<T>;
    x = max(set1(E::zero), x);  // -inf - -inf is nan below; a nan in x stays
    const V n = _mm512_roundscale_ps(mul(x, set1(E::log2e)), 8);
    V r = _mm512_fnmadd_ps(n, set1(E::ln2_high), x);
    r = _mm512_fnmadd_ps(n, set1(E::ln2_low), r);
    V p = set1(E::c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < E::kTerms; ++i) p = fma(p, r, set1(E::c[i]));
    return _mm512_scalef_ps(p, n);
  }
};

struct F64 {
  using T = double;
  using V = __m512d;
  using M = __mmask8;
  static constexpr int L = 8;
  static constexpr int kWide = 3;

  static V load(const T* p) { return _mm512_loadu_pd(p); }
  static void store(T* p, V v) { _mm512_storeu_pd(p, v); }
  static void stream(T* p, V v) { _mm512_stream_pd(p, v); }
  static void fence() { _mm_sfence(); }
  static V set1(T x) { return _mm512_set1_pd(x); }
  static V zero() { return _mm512_setzero_pd(); }
  static V add(V a, V b) { return _mm512_add_pd(a, b); }
  static V sub(V a, V b) { return _mm512_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  static V div(V a, V b) { return _mm512_div_pd(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_pd(a); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static V max(V a, V b) { return _mm512_max_pd(a, b); }
  static M greater(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
  static M not_less_equal(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
  static M equal(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static V select(M m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
  static uint32_t bits(M m) { return m; }

  using Count = __m512i;
  static Count no_count() { return _mm512_setzero_si512(); }
  static Count count(Count c, M m) { return _mm512_mask_add_epi64(c, m, c, _mm512_set1_epi64(1)); }
  static void store_count(int32_t* p, Count c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(c));
  }

  static T sum(V v) { return _mm512_reduce_add_pd(v); }
  static T largest(V v) { return _mm512_reduce_max_pd(v); }

  static ALWAYS_INLINE V sums(const V* v) {
    V two[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V* p = v + 2 * i;
      two[i] = add(_mm512_unpacklo_pd(p[0], p[1]), _mm512_unpackhi_pd(p[0], p[1]));
    }
    const V x = halves(two[0], two[1]), y = halves(two[2], two[3]);
    return halves(x, y);
  }

  static ALWAYS_INLINE V halves(V a, V b) {
    return add(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  }

  static constexpr int kColumns = 2;
  template <class Row>
  static ALWAYS_INLINE void columns(const Row& row, V* out) {
    V rows[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      rows[i] = _mm512_insertf64x4(_mm512_castpd256_pd512(halves(row(i), row(i + 2))),
                                   halves(row(i + 4), row(i + 6)), 1);
    }
    out[0] = _mm512_unpacklo_pd(rows[0], rows[1]);
    out[1] = _mm512_unpackhi_pd(rows[0], rows[1]);
  }

  static ALWAYS_INLINE __m256d halves(const T* low, const T* high) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(low)), _mm_loadu_pd(high), 1);
  }

  static V exp(V x) {
    using E = ExpCoefficients<T>;
    x = max(set1(E::zero), x);
    const V n = _mm512_roundscale_pd(mul(x, set1(E::log2e)), 8);
    V r = _mm512_fnmadd_pd(n, set1(E::ln2_high), x);
    r = _mm512_fnmadd_pd(n, set1(E::ln2_low), r);
    V p = set1(E::c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < E::kTerms; ++i) p = fma(p, r, set1(E::c[i]));
    return _mm512_scalef_pd(p, n);
  }
};

// Vectors of 32-bit words in the low halves of 64 bits; what the upper halves hold is ignored.
struct W32 {
  using V = __m512i;
  static constexpr int L = 8;

  static V set1(uint32_t x) { return _mm512_set1_epi64(x); }
  static V load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static V product(V a, V b) { return _mm512_mul_epu32(a, b); }  // of 64 bits
  static V high(V a) { return _mm512_srli_epi64(a, 32); }
  static V exclusive_or(V a, V b, V c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

  // Four words of each of L counters are 4 L columns. Where lane i holds counter kCounter[i], this
  // writes `factor` to p for words above `least`, else 0, in the order of columns.
  static constexpr uint64_t kCounter[L] = {0, 4, 1, 5, 2, 6, 3, 7};
  static ALWAYS_INLINE void select(const V* w, uint32_t least, F32::V factor, float* p) {
    V v[2];
    in_order(w, v);
    const V limit = _mm512_set1_epi32(static_cast<int>(least));
    for (int i = 0; i < 2; ++i) {
      _mm512_storeu_ps(p + 16 * i,
                       _mm512_maskz_mov_ps(_mm512_cmpgt_epu32_mask(v[i], limit), factor));
    }
  }
  static ALWAYS_INLINE void select(const V* w, uint32_t least, F64::V factor, double* p) {
    V v[2];
    in_order(w, v);
    const V limit = _mm512_set1_epi32(static_cast<int>(least));
    for (int i = 0; i < 2; ++i) {
      const uint32_t kept = _mm512_cmpgt_epu32_mask(v[i], limit);
      _mm512_storeu_pd(p + 16 * i, _mm512_maskz_mov_pd(static_cast<__mmask8>(kept), factor));
      _mm512_storeu_pd(p + 16 * i + 8,
                       _mm512_maskz_mov_pd(static_cast<__mmask8>(kept >> 8), factor));
    }
  }

 private:
  static ALWAYS_INLINE void in_order(const V* w, V* out) {
    const V low = _mm512_mask_blend_epi32(0xaaaa, w[0], _mm512_slli_epi64(w[1], 32));
    const V top = _mm512_mask_blend_epi32(0xaaaa, w[2], _mm512_slli_epi64(w[3], 32));
    out[0] = _mm512_unpacklo_epi64(low, top);
    out[1] = _mm512_unpackhi_epi64(low, top);
  }
};

}  // namespace
