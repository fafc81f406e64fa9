// Host side of ops over rows that stand for positions of sessions.
#pragma once

#include "dropout_key.h"
#include "item_rows.h"
#include "placed_rows.h"

namespace t4r_fast {

template <typename T>
constexpr ScalarType kSums = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// Every buffer of a row has room for this, the columns drawn at once included.
inline int64_t row_room(int64_t width) {
  return round_up(std::max<int64_t>(width, 1), 64);
}

// Rows of x and what stands beside them, kept alive here.
struct PlacedRows {
  PlacedRows(const char* op, const Tensor& x_in, const Tensor& places_in)
      : op(op), count(0), width(0) {
    CHECK(x_in.dim() == 2, op, ": x must have shape (R, W); got ", x_in.dim(), " dimensions");
    x_tensor = with_unit_rows(x_in);
    x = matrix(op, "x", x_tensor);
    count = x_in.size(0);
    width = x_in.size(1);
    const Integers list(op, "places", places_in);
    CHECK(list.count == count, op, ": places must have one entry per row of x, ", count, "; got ",
          list.count);
    places = {list.data, list.stride};
  }

  bool is_double() const { return x.dtype == Dtype::kFloat64; }

  // Another matrix like x.
  Matrix beside(const char* name, const Tensor& given, Tensor* keep) const {
    CHECK(given.dim() == 2 && given.size(0) == count && given.size(1) == width &&
              given.scalar_type() == x_tensor.scalar_type(),
          op, ": ", name, " must have the shape and dtype of x");
    *keep = with_unit_rows(given);
    return matrix(op, name, *keep);
  }

  RowsOut out(Tensor& tensor) const { return {tensor.mutable_data_ptr(), x.dtype}; }

  // part(first row, row after the last), of whole blocks of kSummedRows rows.
  template <typename Part>
  void split(const Part& part) const {
    constexpr int64_t kNumbersPerThread = 1 << 15;  // some 20 us; waking a thread takes 5 us
    const int64_t grain = kNumbersPerThread / (kSummedRows * std::max<int64_t>(width, 1)) + 1;
    torch::stable::parallel_for(0, blocks(), grain, [&](int64_t block, int64_t stop) {
      part(block * kSummedRows, std::min(stop * kSummedRows, count));
    });
  }

  int64_t blocks() const { return (count + kSummedRows - 1) / kSummedRows; }

  const char* op;
  Tensor x_tensor;
  Matrix x;
  Places places;
  int64_t count, width;
};

// A number for each column in the type of sums, zeros past the width; null without one.
template <typename T>
class ColumnVector {
 public:
  ColumnVector(const PlacedRows& rows, const char* name, const std::optional<Tensor>& given)
      : numbers_(given.has_value() ? row_room(rows.width) : 0), given_(given.has_value()) {
    if (!given_) return;
    CHECK(given->dim() == 1 && given->size(0) == rows.width, rows.op, ": ", name,
          " must have shape (W,), (", rows.width, ",)");
    CHECK(given->scalar_type() == rows.x_tensor.scalar_type() ||
              given->scalar_type() == ScalarType::Float,
          rows.op, ": ", name, " must have the dtype of x, or float32");
    const Matrix from = matrix(rows.op, name, *given);
    for (int64_t k = 0; k < row_room(rows.width); ++k) numbers_[k] = 0;
    for (int64_t k = 0; k < rows.width; ++k) {
      convert(from, k * from.stride, 1, numbers_.data() + k);
    }
  }
  const T* data() const { return given_ ? numbers_.data() : nullptr; }

 private:
  Buffer<T> numbers_;
  bool given_;
};

inline Tensor in_dtype(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  Tensor out = torch::stable::new_empty(tensor, tensor.sizes(), type);
  torch::stable::copy_(out, tensor);
  return out;
}

// The sums of blocks, (blocks, columns), in their order.
template <typename T>
void sum_of_blocks(const Buffer<T>& parts, int64_t blocks, int64_t columns, int64_t stride,
                   T* out) {
  for (int64_t k = 0; k < columns; ++k) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += static_cast<double>(parts[b * stride + k]);
    out[k] = static_cast<T>(total);
  }
}

}  // namespace t4r_fast
