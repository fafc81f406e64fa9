// The lower tail of the normal distribution: Phi(-z) = exp(-z^2 / 2) t p(2 t - 1), t = 4 / (z + 4),
// for z >= 0. p is a Chebyshev interpolation of Phi(-z) exp(z^2 / 2) / t, a smooth function of t on
// [0, 1]. Relative errors of p before rounding are below 5e-8 and 2e-17.
#pragma once

namespace {

template <typename T>
struct NormalCoefficients;

template <>
struct NormalCoefficients<float> {
  static constexpr int kTerms = 10;
  static constexpr float c[kTerms] = {
      3.933014e-05f,  3.233142e-05f, -3.9094672e-04f, -8.6904195e-04f, 1.8780578e-03f,
      1.5098824e-02f, 4.663168e-02f, 9.678439e-02f,   1.519741e-01f,   1.8882129e-01f};
};

template <>
struct NormalCoefficients<double> {
  static constexpr int kTerms = 25;
  static constexpr double c[kTerms] = {
      8.508280771623737e-11,   2.999445507813274e-11,   -9.326612704670926e-10,
      1.4684066912467977e-10,  5.356900960863089e-09,   -4.461231943245354e-09,
      -2.1716617539994733e-08, 3.994349035559805e-08,   6.811574237786468e-08,
      -2.5619627541381934e-07, -1.5745918346230922e-07, 1.4804027614809944e-06,
      1.7916469102987802e-07,  -8.786277975709413e-06,  -4.770615878536427e-07,
      5.7773754340693565e-05,  3.333607735295814e-05,   -0.00040770461685247714,
      -0.0008699230917619934,  0.001885047241846578,    0.015099143722729469,
      0.04663046448990915,     0.09678435018555373,     0.15197416049297308,
      0.18882128260393788};
};

}  // namespace
