// The floors by vector types of four floats: what every compiler target has.

#include "host_floors.h"

namespace t4r_fast {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int Int __attribute__((vector_size(16)));

constexpr int kWidth = 4;
constexpr int kChains = 12;

Vec load(const float* x) {
  Vec v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

Vec all(float x) {
  return Vec{x, x, x, x};
}

float sum(Vec v) {
  return v[0] + v[1] + v[2] + v[3];
}

double multiply_add(long steps, float* sink) {
  Vec chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = all(sink[0] + static_cast<float>(i));
  const Vec a = all(sink[1]), b = all(sink[2]);
  for (long s = 0; s < steps; ++s) {
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * a + b;
  }
  for (int i = 0; i < kChains; ++i) sink[0] += sum(chain[i]);
  return 2.0 * kWidth * kChains * static_cast<double>(steps);
}

// exp by 2^n times a polynomial of degree 5 on [-ln 2 / 2, ln 2 / 2], error 2e-7 (Cephes).
Vec exp_vec(Vec x) {
  const Vec low = all(-87.3f);
  x = x < low ? low : x;
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = (x * all(1.44269504f) + magic) - magic;
  const Vec r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
  Vec p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  const Int scale = (__builtin_convertvector(n, Int) + 127) << 23;
  return p * reinterpret_cast<const Vec&>(scale);
}

void exp_sum(const float* x, size_t n, float* sink) {
  Vec total[4] = {};
  for (size_t i = 0; i < n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) total[j] += exp_vec(load(x + i + j * kWidth));
  }
  sink[0] = sum(total[0] + total[1] + total[2] + total[3]);
}

void read(const float* x, size_t n, float* sink) {
  Vec total[8] = {};
  for (size_t i = 0; i < n; i += 8 * kWidth) {
    for (int j = 0; j < 8; ++j) total[j] += load(x + i + j * kWidth);
  }
  for (int j = 1; j < 8; ++j) total[0] += total[j];
  sink[0] = sum(total[0]);
}

}  // namespace

const FloorKernels kFloorsPortable = {&multiply_add, &exp_sum, &read};

}  // namespace t4r_fast
