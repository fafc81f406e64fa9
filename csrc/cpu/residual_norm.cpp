// residual_norm: a row after the other, in the first-level cache. Backward draws again and makes
// the sum from x and residual. Gradients of weight, norm_bias and bias are summed over blocks of
// rows, then over the blocks in their order: the bits do not depend on the number of threads.
#include "residual_norm.h"

#include <tuple>

// The vector unit comes first.
#include "simd_portable.h"

// and what converts rows
#include "float_types.h"
#include "placed_rows_host.h"

namespace t4r_fast {

extern const NormKernels<float> residual_norm_f32_portable, residual_norm_f32_avx2,
    residual_norm_f32_avx512;
extern const NormKernels<double> residual_norm_f64_portable, residual_norm_f64_avx2,
    residual_norm_f64_avx512;

namespace {

constexpr const char* kOp = "residual_norm";

template <typename T>
const NormKernels<T>& kernels();

template <>
const NormKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(residual_norm_f32);
}
template <>
const NormKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(residual_norm_f64);
}

// The arguments of forward and backward alike, kept alive here.
struct Arguments {
  Arguments(const Tensor& x, const Tensor& residual, const Tensor& weight,
            const std::optional<Tensor>& norm_bias, const Tensor& places,
            const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, double dropout,
            int64_t site)
      : rows(kOp, x, places),
        residual(rows.beside("residual", residual, &residual_tensor)),
        weight(weight),
        norm_bias(norm_bias),
        bias(bias),
        dropout(dropout_of(kOp, seed, site, dropout)) {
    CHECK(rows.width > 0, kOp, ": x must have W >= 1");
  }

  PlacedRows rows;
  Tensor residual_tensor;
  Matrix residual;
  std::optional<Tensor> weight, norm_bias, bias;
  Dropout dropout;
};

template <typename T>
struct Columns {
  explicit Columns(const Arguments& a)
      : bias(a.rows, "bias", a.bias),
        weight(a.rows, "weight", a.weight),
        norm_bias(a.rows, "norm_bias", a.norm_bias) {}

  NormRows<T> rows(const Arguments& a) const {
    return {a.rows.x,      a.residual,       {nullptr, 0, a.rows.x.dtype},
            a.rows.places, a.dropout,        bias.data(),
            weight.data(), norm_bias.data(), a.rows.width,
            T(0)};
  }

  ColumnVector<T> bias, weight, norm_bias;
};

template <typename T>
void forward(const Arguments& a, double eps, Tensor& y, Tensor& mean, Tensor& rstd) {
  const Columns<T> columns(a);
  NormForward<T> f{columns.rows(a), a.rows.out(y), static_cast<T*>(mean.mutable_data_ptr()),
                   static_cast<T*>(rstd.mutable_data_ptr())};
  f.rows.eps = static_cast<T>(eps);
  a.rows.split([&](int64_t row, int64_t stop) {
    const Buffer<T> scratch(kNormBuffers * row_room(a.rows.width));
    kernels<T>().forward(f, row, stop, scratch.data());
  });
}

struct Gradients {
  Tensor dx, dresidual, sums;
};

template <typename T>
const T* per_row(const PlacedRows& rows, const char* name, const Tensor& tensor) {
  CHECK(tensor.dim() == 1 && tensor.size(0) == rows.count && tensor.is_contiguous() &&
            tensor.scalar_type() == kSums<T>,
        kOp, ": ", name, " must be contiguous, of the type of sums, with shape (R,)");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
void backward(const Arguments& a, const Matrix& dy, const Tensor& mean, const Tensor& rstd,
              bool of_columns, Gradients& out) {
  const PlacedRows& rows = a.rows;
  const Columns<T> columns(a);
  const int64_t stride = 3 * row_room(rows.width);
  const Buffer<T> sums(of_columns ? rows.blocks() * stride : 0);
  NormBackward<T> b{columns.rows(a),
                    per_row<T>(rows, "mean", mean),
                    per_row<T>(rows, "rstd", rstd),
                    rows.out(out.dx),
                    rows.out(out.dresidual),
                    of_columns ? sums.data() : nullptr,
                    stride};
  b.rows.dy = dy;
  if (out.dx.size(0) != rows.count) b.dx.data = nullptr;
  rows.split([&](int64_t row, int64_t stop) {
    const Buffer<T> scratch(kNormBuffers * row_room(rows.width));
    kernels<T>().backward(b, row, stop, scratch.data());
  });
  if (!of_columns) return;
  T* const total = static_cast<T*>(out.sums.mutable_data_ptr());
  const Buffer<T> all(stride);
  sum_of_blocks<T>(sums, rows.blocks(), stride, stride, all.data());
  for (int64_t i = 0; i < 3; ++i) {
    std::copy_n(all.data() + i * stride / 3, rows.width, total + i * rows.width);
  }
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_fwd_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& norm_bias,
    const Tensor& places, const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
    double eps, double dropout, int64_t site) {
  const Arguments a(x, residual, weight, norm_bias, places, bias, seed, dropout, site);
  const ScalarType type = a.rows.is_double() ? ScalarType::Double : ScalarType::Float;
  Tensor y = torch::stable::new_empty(x, {a.rows.count, a.rows.width});
  Tensor mean = torch::stable::new_empty(x, {a.rows.count}, type);
  Tensor rstd = torch::stable::new_empty(x, {a.rows.count}, type);
  (a.rows.is_double() ? forward<double> : forward<float>)(a, eps, y, mean, rstd);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_bwd_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& residual, const Tensor& weight,
    const Tensor& places, const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
    const Tensor& mean, const Tensor& rstd, double dropout, int64_t site, bool of_columns) {
  const Arguments a(x, residual, weight, std::nullopt, places, bias, seed, dropout, site);
  Tensor keep;
  const Matrix dy_rows = a.rows.beside("dy", dy, &keep);
  const int64_t count = a.rows.count, width = a.rows.width;
  Gradients out{
      torch::stable::new_empty(x, {seed.has_value() ? count : 0, width}),
      torch::stable::new_empty(x, {count, width}),
      torch::stable::new_empty(x, {of_columns ? 3 : 0, width},
                               a.rows.is_double() ? ScalarType::Double : ScalarType::Float)};
  (a.rows.is_double() ? backward<double> : backward<float>)(a, dy_rows, mean, rstd, of_columns,
                                                            out);
  return {out.dx, out.dresidual, out.sums};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("residual_norm_fwd", TORCH_BOX(&t4r_fast::residual_norm_fwd_cpu));
  m.impl("residual_norm_bwd", TORCH_BOX(&t4r_fast::residual_norm_bwd_cpu));
}
