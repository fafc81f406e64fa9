// The floors by AVX2 and FMA.

#include <immintrin.h>

#include "host_floors.h"

namespace t4r_fast {
namespace {

constexpr int kWidth = 8;
// Two units of latency 4 or 5 want 10 chains; 12 and two constants fit into 16 registers.
constexpr int kChains = 12;

float sum(__m256 v) {
  float lanes[kWidth];
  _mm256_storeu_ps(lanes, v);
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

double multiply_add(long steps, float* sink) {
  __m256 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm256_set1_ps(sink[0] + static_cast<float>(i));
  const __m256 a = _mm256_set1_ps(sink[1]), b = _mm256_set1_ps(sink[2]);
  for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = _mm256_fmadd_ps(chain[i], a, b);
  }
  for (int i = 0; i < kChains; ++i) sink[0] += sum(chain[i]);
  return 2.0 * kWidth * kChains * static_cast<double>(steps);
}

// See host_portable.cpp.
inline __m256 exp_vec(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.3f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i scale =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(scale));
}

void exp_sum(const float* x, size_t n, float* sink) {
  __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                     _mm256_setzero_ps()};
  for (size_t i = 0; i < n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      total[j] = _mm256_add_ps(total[j], exp_vec(_mm256_loadu_ps(x + i + j * kWidth)));
    }
  }
  sink[0] = sum(total[0]) + sum(total[1]) + sum(total[2]) + sum(total[3]);
}

void read(const float* x, size_t n, float* sink) {
  __m256 total[8];
  for (int j = 0; j < 8; ++j) total[j] = _mm256_setzero_ps();
  for (size_t i = 0; i < n; i += 8 * kWidth) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      total[j] = _mm256_add_ps(total[j], _mm256_loadu_ps(x + i + j * kWidth));
    }
  }
  for (int j = 0; j < 8; ++j) sink[0] += sum(total[j]);
}

}  // namespace

const FloorKernels kFloorsAvx2 = {&multiply_add, &exp_sum, &read};

}  // namespace t4r_fast
