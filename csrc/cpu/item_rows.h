// Host side of the item ops: arguments of the dispatcher to plain structs, the rows that take part,
// memory, and the split of the items among threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "../check.h"
#include "isa.h"
#include "item_table.h"

namespace t4r_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Packed rows and one partial result per thread stay below this; more rows go chunk by chunk.
constexpr int64_t kWorkspaceBytes = int64_t{48} << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
class Buffer {
 public:
  // Not initialised; starts on a cache line.
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T, Free> data_;
};

// Large pages for a large new tensor: the kernel hands out 4 KiB at a time otherwise, which took
// 75 ms for the gradient of 118k items of width 256, more than making it for 16 rows. Pages that
// are there already stay as they are.
inline void use_huge_pages([[maybe_unused]] const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (start + kPage - 1) / kPage * kPage,
                  last = (start + bytes) / kPage * kPage;
  // Advice: a system without them goes on as before.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

inline Dtype dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      CHECK(false, op, ": ", name, " must be float32, float16, bfloat16, float64; got scalar type ",
            static_cast<int>(tensor.scalar_type()));
  }
  return Dtype::kFloat32;
}

// The elements of a row next to each other: a copy if they are not.
inline Tensor with_unit_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Matrix matrix(const char* op, const char* name, const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), dtype_of(op, name, tensor)};
}

// hidden, items and bias, checked; tensors are kept alive here.
struct Scores {
  Scores(const char* op, const Tensor& hidden_in, const Tensor& items_in,
         const std::optional<Tensor>& bias) {
    CHECK(hidden_in.dim() == 2, op, ": hidden must have shape (N, D); got ", hidden_in.dim(),
          " dimensions");
    CHECK(items_in.dim() == 2 && items_in.size(0) > 0 && items_in.size(1) == hidden_in.size(1), op,
          ": items must have shape (V, D) with V >= 1 and the D of hidden, ", hidden_in.size(1));
    CHECK(items_in.scalar_type() == hidden_in.scalar_type(), op,
          ": items must have the dtype of hidden");
    hidden_tensor = with_unit_rows(hidden_in);
    items_tensor = with_unit_rows(items_in);
    hidden = matrix(op, "hidden", hidden_tensor);
    hidden_count = hidden_in.size(0);
    table.items = matrix(op, "items", items_tensor);
    table.count = items_in.size(0);
    table.width = items_in.size(1);
    table.bias = {nullptr, 0, Dtype::kFloat32};
    if (bias.has_value()) {
      CHECK(bias->dim() == 1 && bias->size(0) == table.count, op, ": bias must have shape (V,), (",
            table.count, ",)");
      table.bias = matrix(op, "bias", *bias);
      CHECK(table.bias.dtype == table.items.dtype || table.bias.dtype == Dtype::kFloat32, op,
            ": bias must have the dtype of hidden, or float32");
    }
    tiles = (table.count + kTile - 1) / kTile;
  }

  bool is_double() const { return table.items.dtype == Dtype::kFloat64; }
  bool is_half() const {
    return table.items.dtype == Dtype::kFloat16 || table.items.dtype == Dtype::kBFloat16;
  }

  // A function of sizes and of PyTorch's number of threads only: the split decides the order of
  // sums, and so their bits.
  int64_t threads(int64_t rows) const {
    constexpr double kProductsPerThread = 2e6;  // some 20 us; waking a thread takes 5 us
    const double products = static_cast<double>(rows) * static_cast<double>(table.count) *
                            static_cast<double>(table.width + 8);
    const int64_t useful = static_cast<int64_t>(std::min(products / kProductsPerThread, 1e6)) + 1;
    return std::min({static_cast<int64_t>(torch::stable::get_num_threads()), useful, tiles});
  }

  Tensor hidden_tensor, items_tensor;
  Matrix hidden;
  int64_t hidden_count, tiles;
  ItemTable table;
};

// part(thread, first tile, tile after the last), one call per thread.
template <typename Part>
void split_tiles(int64_t tiles, int64_t threads, const Part& part) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t stop) {
    for (; thread < stop; ++thread) {
      part(thread, tiles * thread / threads, tiles * (thread + 1) / threads);
    }
  });
}

// Integers of a one-dimensional tensor with any stride.
struct Integers {
  Integers(const char* op, const char* name, const Tensor& tensor)
      : data(tensor.const_data_ptr<int64_t>()), count(tensor.size(0)), stride(tensor.stride(0)) {
    CHECK(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long, op, ": ", name,
          " must be int64 with one dimension");
  }
  int64_t operator[](int64_t i) const { return data[i * stride]; }

  const int64_t* data;
  int64_t count, stride;
};

// The entries of the output that take part: `source` is their row of hidden, `slot` their place.
struct Kept {
  Kept(const char* op, const Scores& scores, const std::optional<Tensor>& rows,
       const Tensor* target_tensor, int64_t ignore_index) {
    std::optional<Integers> list, targets;
    if (rows.has_value()) list.emplace(op, "rows", *rows);
    if (target_tensor != nullptr) {
      targets.emplace(op, "target", *target_tensor);
      CHECK(targets->count == scores.hidden_count, op,
            ": target must have one entry per row of hidden, ", scores.hidden_count, "; got ",
            targets->count);
    }
    size = list ? list->count : scores.hidden_count;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t row = list ? (*list)[i] : i;
      if (row < 0) continue;
      CHECK(row < scores.hidden_count, op, ": rows must be < ", scores.hidden_count,
            " (the rows of hidden), or negative to skip; got ", row, " at entry ", i);
      if (targets) {
        const int64_t item = (*targets)[row];
        if (item == ignore_index) continue;
        CHECK(item >= 0 && item < scores.table.count, op, ": target must be 0 <= target < ",
              scores.table.count, " (the rows of items) or ignore_index, ", ignore_index, "; got ",
              item, " at row ", row);
        target.push_back(item);
      }
      source.push_back(row);
      slot.push_back(i);
    }
    count = static_cast<int64_t>(source.size());
  }

  int64_t size, count;
  std::vector<int64_t> source, slot, target;
};

// Chunks of rows that keep the workspace below kWorkspaceBytes.
inline int64_t rows_per_chunk(int64_t rows, int64_t bytes_per_row, int64_t unit) {
  return std::min(std::max<int64_t>(rows, 1),
                  std::max(unit, kWorkspaceBytes / bytes_per_row / unit * unit));
}

enum class RowsLie { kInChunks, kWhole };  // PackedRows::chunk

template <typename T>
struct Packed {
  // lanes is the vector of the kernels in elements
  Packed(int64_t count, int64_t width, int64_t lanes, RowsLie lie = RowsLie::kInChunks)
      : lane_rows(round_up(count, lanes)),
        padded(round_up(width, lanes)),
        panels(lane_rows * width),
        rows(count * padded),
        view{count,         width,      padded, lie == RowsLie::kWhole ? padded : kChunk<T>,
             panels.data(), rows.data()} {}

  int64_t lane_rows, padded;
  Buffer<T> panels, rows;
  PackedRows<T> view;
};

}  // namespace t4r_fast
