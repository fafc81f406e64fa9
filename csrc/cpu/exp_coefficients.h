// exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2 in two steps. Constants for the vector
// units' exp.
#pragma once

namespace {

template <typename T>
struct ExpCoefficients;

// exp(r) = 1 + r + ...: minimax on [-ln 2 / 2, ln 2 / 2], relative error 3e-9 before rounding.
template <>
struct ExpCoefficients<float> {
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // Adding this rounds to a whole number and leaves it in the low bits as a float's exponent.
  static constexpr float round = 12582912.f + 127.f;
  static constexpr float least = -87.33654f;  // below: less than the least normal number
  static constexpr float zero = -104.f;       // below: less than half of the least denormal
  static constexpr int kTerms = 7;
  static constexpr float c[kTerms] = {1.38146132608e-3f,
                                      8.36870982417e-3f,
                                      4.16683873613e-2f,
                                      1.66665206898e-1f,
                                      4.99999934517e-1f,
                                      1.f,
                                      1.f};
};

// The Taylor polynomial: the next term is 4e-18.
template <>
struct ExpCoefficients<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744.0 + 1023.0;
  static constexpr double least = -708.3964185322641;
  static constexpr double zero = -746.0;
  static constexpr int kTerms = 14;
  static constexpr double c[kTerms] = {1. / 6227020800,
                                       1. / 479001600,
                                       1. / 39916800,
                                       1. / 3628800,
                                       1. / 362880,
                                       1. / 40320,
                                       1. / 5040,
                                       1. / 720,
                                       1. / 120,
                                       1. / 24,
                                       1. / 6,
                                       1. / 2,
                                       1.,
                                       1.};
};

}  // namespace
