// The floors by AVX-512F.

#include <immintrin.h>

#include "host_floors.h"

namespace t4r_fast {
namespace {

constexpr int kWidth = 16;
constexpr int kChains = 16;

double multiply_add(long steps, float* sink) {
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(sink[0] + static_cast<float>(i));
  const __m512 a = _mm512_set1_ps(sink[1]), b = _mm512_set1_ps(sink[2]);
  for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_fmadd_ps(chain[i], a, b);
  }
  for (int i = 0; i < kChains; ++i) sink[0] += _mm512_reduce_add_ps(chain[i]);
  return 2.0 * kWidth * kChains * static_cast<double>(steps);
}

// See host_portable.cpp; scalef multiplies by 2^n.
inline __m512 exp_vec(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

void exp_sum(const float* x, size_t n, float* sink) {
  __m512 total[4];
  for (int j = 0; j < 4; ++j) total[j] = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      total[j] = _mm512_add_ps(total[j], exp_vec(_mm512_loadu_ps(x + i + j * kWidth)));
    }
  }
  sink[0] = 0;
  for (int j = 0; j < 4; ++j) sink[0] += _mm512_reduce_add_ps(total[j]);
}

void read(const float* x, size_t n, float* sink) {
  __m512 total[8];
  for (int j = 0; j < 8; ++j) total[j] = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i += 8 * kWidth) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      total[j] = _mm512_add_ps(total[j], _mm512_loadu_ps(x + i + j * kWidth));
    }
  }
  for (int j = 0; j < 8; ++j) sink[0] += _mm512_reduce_add_ps(total[j]);
}

}  // namespace

const FloorKernels kFloorsAvx512 = {&multiply_add, &exp_sum, &read};

}  // namespace t4r_fast
