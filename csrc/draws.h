// Items drawn from a counter: the same ids as t4r_fast/plain/_draws.py, bit for bit.
// float64 addition, multiplication and rounding alone, none of them fused: device code says so, a
// C++ compiler needs -ffp-contract=off. No torch and no standard library beyond <cstdint>.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "philox.h"

namespace t4r_fast {

// Three bits of the counter. 0 and 1 are those of mask_mlm, 4 to 6 mask_permutation's.
enum DrawKind : uint32_t { kSample = 2, kNegative = 3 };

#ifdef __CUDA_ARCH__
HOST_DEVICE inline double rounded_product(double a, double b) {
  return __dmul_rn(a, b);
}
HOST_DEVICE inline double rounded_sum(double a, double b) {
  return __dadd_rn(a, b);
}
#else
HOST_DEVICE inline double rounded_product(double a, double b) {
  return a * b;
}
HOST_DEVICE inline double rounded_sum(double a, double b) {
  return a + b;
}
#endif

struct Seed {
  // From the two numbers of a seed tensor.
  HOST_DEVICE static Seed of(int64_t key, int64_t offset) {
    const uint64_t place = static_cast<uint64_t>(offset);
    return {static_cast<uint64_t>(key), static_cast<uint32_t>(place >> 32) << 3,
            static_cast<uint32_t>(place)};
  }
  HOST_DEVICE Words counter(uint32_t index, uint32_t set, uint32_t draw) const {
    return {{index, set, kind | draw, low}};
  }
  uint64_t key;
  uint32_t kind, low;
};

// 53 random bits as a number in [0, 1).
HOST_DEVICE inline double unit(uint32_t first, uint32_t second) {
  const uint64_t bits = (uint64_t{first >> 5} << 26) | (second >> 6);
  return static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-53;
}

// The u of draws 2 * pair and 2 * pair + 1 of a set.
HOST_DEVICE inline void unit_pair(const Seed& seed, DrawKind draw, uint32_t set, uint32_t pair,
                                  double* u) {
  const Words words = philox(seed.key, seed.counter(pair, set, draw));
  u[0] = unit(words.w[0], words.w[1]);
  u[1] = unit(words.w[2], words.w[3]);
}

// exp of 0 <= t < 64 within 2 ulp.
HOST_DEVICE inline double exact_exp(double t) {
  constexpr double kFactors[] = {1.0 / 6227020800,
                                 1.0 / 479001600,
                                 1.0 / 39916800,
                                 1.0 / 3628800,
                                 1.0 / 362880,
                                 1.0 / 40320,
                                 1.0 / 5040,
                                 1.0 / 720,
                                 1.0 / 120,
                                 1.0 / 24,
                                 1.0 / 6,
                                 0.5,
                                 1.0,
                                 1.0};
  // t is not negative: truncation is floor
  const int64_t n = static_cast<int64_t>(rounded_sum(rounded_product(t, 1.4426950408889634), 0.5));
  const double whole = static_cast<double>(n);
  double r = rounded_sum(t, -rounded_product(whole, 6.93147180369123816490e-01));
  r = rounded_sum(r, -rounded_product(whole, 1.90821492927058770002e-10));
  double p = kFactors[0];
  for (int k = 1; k < 14; ++k) p = rounded_sum(rounded_product(p, r), kFactors[k]);
  const int64_t bits = (n + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return rounded_product(p, power);
}

// Class c of 0 to size - 1 with probability log((c + 2) / (c + 1)) / log(size + 1).
HOST_DEVICE inline int64_t log_uniform(double u, int64_t size, double log_size) {
  const int64_t c = static_cast<int64_t>(exact_exp(rounded_product(u, log_size))) - 1;
  return c < 0 ? 0 : c < size ? c : size - 1;
}

HOST_DEVICE inline int64_t uniform(double u, int64_t size) {
  const int64_t i = static_cast<int64_t>(u * static_cast<double>(size));
  return i < size ? i : size - 1;
}

}  // namespace t4r_fast
