// activation_dropout: a row after the other, in the first-level cache. Backward draws again and
// makes the activation from x. The gradient of bias is summed over blocks of rows, then over the
// blocks in their order: the bits do not depend on the number of threads.
#include "activation_dropout.h"

#include <tuple>

// The vector unit comes first.
#include "simd_portable.h"

// and what converts rows
#include "float_types.h"
#include "placed_rows_host.h"

namespace t4r_fast {

extern const ActivationKernels<float> activation_dropout_f32_portable, activation_dropout_f32_avx2,
    activation_dropout_f32_avx512;
extern const ActivationKernels<double> activation_dropout_f64_portable, activation_dropout_f64_avx2,
    activation_dropout_f64_avx512;

namespace {

constexpr const char* kOp = "activation_dropout";

template <typename T>
const ActivationKernels<T>& kernels();

template <>
const ActivationKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(activation_dropout_f32);
}
template <>
const ActivationKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(activation_dropout_f64);
}

struct Options {
  int64_t activation;
  Dropout dropout;
};

Options options_of(const std::optional<Tensor>& seed, int64_t activation, double dropout,
                   int64_t site) {
  CHECK(activation >= 0 && activation < kActivations, kOp, ": activation must be 0 to ",
        kActivations - 1, "; got ", activation);
  return {activation, dropout_of(kOp, seed, site, dropout)};
}

template <typename T>
ActivationRows<T> rows_of(const PlacedRows& rows, const Options& options, const T* bias,
                          Tensor& out) {
  return {rows.x,      {nullptr, 0, rows.x.dtype},
          rows.places, options.dropout,
          bias,        options.activation,
          rows.width,  rows.out(out),
          nullptr,     0};
}

template <typename T>
void forward(const PlacedRows& rows, const std::optional<Tensor>& bias, const Options& options,
             Tensor& y) {
  const ColumnVector<T> columns(rows, "bias", bias);
  const ActivationRows<T> a = rows_of<T>(rows, options, columns.data(), y);
  rows.split([&](int64_t row, int64_t stop) {
    const Buffer<T> scratch(4 * row_room(rows.width));
    kernels<T>().forward(a, row, stop, scratch.data());
  });
}

template <typename T>
Tensor backward(const PlacedRows& rows, const Matrix& dy, const std::optional<Tensor>& bias,
                const Options& options, bool needs_bias, Tensor& dx) {
  const ColumnVector<T> columns(rows, "bias", bias);
  const int64_t stride = row_room(rows.width);
  const Buffer<T> sums(needs_bias ? rows.blocks() * stride : 0);
  ActivationRows<T> a = rows_of<T>(rows, options, columns.data(), dx);
  a.dy = dy;
  a.sums = needs_bias ? sums.data() : nullptr;
  a.sums_stride = stride;
  rows.split([&](int64_t row, int64_t stop) {
    const Buffer<T> scratch(4 * stride);
    kernels<T>().backward(a, row, stop, scratch.data());
  });
  Tensor dbias = torch::stable::new_empty(rows.x_tensor, {needs_bias ? rows.width : 0}, kSums<T>);
  if (needs_bias) {
    sum_of_blocks<T>(sums, rows.blocks(), rows.width, stride,
                     static_cast<T*>(dbias.mutable_data_ptr()));
  }
  return dbias;
}

Tensor activation_dropout_fwd_cpu(const Tensor& x, const Tensor& places,
                                  const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& seed, int64_t activation,
                                  double dropout, int64_t site) {
  const PlacedRows rows(kOp, x, places);
  const Options options = options_of(seed, activation, dropout, site);
  Tensor y = torch::stable::new_empty(x, {rows.count, rows.width});
  (rows.is_double() ? forward<double> : forward<float>)(rows, bias, options, y);
  return y;
}

std::tuple<Tensor, Tensor> activation_dropout_bwd_cpu(const Tensor& dy, const Tensor& x,
                                                      const Tensor& places,
                                                      const std::optional<Tensor>& bias,
                                                      const std::optional<Tensor>& seed,
                                                      int64_t activation, double dropout,
                                                      int64_t site, bool needs_bias) {
  const PlacedRows rows(kOp, x, places);
  const Options options = options_of(seed, activation, dropout, site);
  Tensor keep;
  const Matrix dy_rows = rows.beside("dy", dy, &keep);
  Tensor dx = torch::stable::new_empty(x, {rows.count, rows.width});
  const Tensor sums =
      (rows.is_double() ? backward<double> : backward<float>)(rows, dy_rows, bias, options,
                                                              needs_bias, dx);
  return {dx, in_dtype(sums, bias.has_value() ? bias->scalar_type() : x.scalar_type())};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("activation_dropout_fwd", TORCH_BOX(&t4r_fast::activation_dropout_fwd_cpu));
  m.impl("activation_dropout_bwd", TORCH_BOX(&t4r_fast::activation_dropout_bwd_cpu));
}
