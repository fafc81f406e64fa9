// Where the columns of sequence_embedding lie: arguments of the dispatcher, checked, as pointers
// and strides.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../check.h"

namespace t4r_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "sequence_embedding";
// What numbers of a dtype are added in.
template <typename S>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <typename Run>
auto by_dtype(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::Half:
      return run(torch::headeronly::Half());
    default:
      CHECK(type == ScalarType::BFloat16, kOp,
            ": tables must be float32, float16, bfloat16 or float64; got scalar type ",
            static_cast<int>(type));
      return run(torch::headeronly::BFloat16());
  }
}

// Where the elements of (B, L) lie, by position b * L + l.
struct Place {
  Place() = default;
  Place(const Tensor& tensor, int64_t positions)
      : positions(positions), stride_b(tensor.stride(0)), stride_l(tensor.stride(1)) {
    even = stride_b == positions * stride_l;
  }
  int64_t operator()(int64_t position) const {
    if (even) return position * stride_l;  // without divisions, which would take the longest
    return position / positions * stride_b + position % positions * stride_l;
  }
  int64_t positions, stride_b, stride_l;
  bool even;
};

// A table's ids (B, L), or numbers (B, L, width).
struct Column {
  int64_t id(int64_t position) const { return ids[place(position)]; }
  const char* row(int64_t i) const { return table + i * row_bytes; }
  const char* number(int64_t position) const { return table + place(position) * size; }

  bool has_table;
  const int64_t* ids;
  const char* table;  // or the numbers
  int64_t rows, width, size, row_bytes, stride_w, start;
  Place place;
};

struct Layout {
  Layout(const std::vector<Tensor>& tensors, const std::vector<std::optional<Tensor>>& tables,
         bool sum) {
    CHECK(!tensors.empty() && tensors.size() == tables.size(), kOp,
          ": columns and tables must be equally many, at least one; got ", tensors.size(), " and ",
          tables.size());
    sessions = tensors[0].size(0);
    positions = tensors[0].size(1);
    const auto with_table = std::find_if(tables.begin(), tables.end(),
                                         [](const auto& table) { return table.has_value(); });
    type = (with_table == tables.end() ? tensors[0] : **with_table).scalar_type();
    for (size_t f = 0; f < tensors.size(); ++f) add(tensors[f], tables[f], sum);
    if (sum) width = columns[0].width;
  }

  void add(const Tensor& tensor, const std::optional<Tensor>& table, bool sum) {
    CHECK(tensor.dim() >= 2 && tensor.size(0) == sessions && tensor.size(1) == positions, kOp,
          ": columns must have shape (", sessions, ", ", positions, ")");
    Column c{};
    c.place = Place(tensor, positions);
    c.start = sum ? 0 : width;
    if (table.has_value()) {
      CHECK(tensor.dim() == 2 && table->dim() == 2, kOp, ": ids and tables must be matrices");
      CHECK_INT64(kOp, tensor);
      CHECK(table->scalar_type() == type, kOp, ": tables must share one dtype");
      kept.push_back(table->size(1) <= 1 || table->stride(1) == 1
                         ? *table
                         : torch::stable::contiguous(*table));
      c.has_table = true;
      c.ids = tensor.const_data_ptr<int64_t>();
      c.table = static_cast<const char*>(kept.back().const_data_ptr());
      c.rows = table->size(0);
      c.width = table->size(1);
      c.size = static_cast<int64_t>(kept.back().element_size());
      c.row_bytes = kept.back().stride(0) * c.size;
    } else {
      CHECK(tensor.scalar_type() == type, kOp, ": columns must have the dtype of the tables");
      c.table = static_cast<const char*>(tensor.const_data_ptr());
      c.width = tensor.dim() == 3 ? tensor.size(2) : 1;
      c.stride_w = tensor.dim() == 3 ? tensor.stride(2) : 1;
      c.size = static_cast<int64_t>(tensor.element_size());
    }
    CHECK(!sum || columns.empty() || columns[0].width == c.width, kOp,
          ": aggregation 'sum' needs columns of one width");
    width += c.width;
    columns.push_back(c);
  }

  int64_t sessions, positions, width = 0;
  ScalarType type;
  std::vector<Column> columns;
  std::vector<Tensor> kept;  // contiguous copies, alive while their data is used
};

// How many positions are read: all, or those up to the last offset of packed sessions.
inline int64_t count_items(int64_t sessions, int64_t positions,
                           const std::optional<Tensor>& packed) {
  if (!packed.has_value()) return sessions * positions;
  const Tensor& offsets = *packed;
  CHECK_DIM(kOp, offsets, 1, "(B + 1,)");
  CHECK_INT64(kOp, offsets);
  const int64_t last = offsets.size(0) - 1;
  CHECK(last >= 0 && sessions == 1, kOp,
        ": offsets must have one entry at least, and columns with them one session");
  const int64_t end = offsets.const_data_ptr<int64_t>()[last * offsets.stride(0)];
  CHECK(end >= 0 && end <= positions, kOp, ": offsets must end at 0 to ", positions,
        ", the items that there are; got ", end);
  return end;
}

// Which positions are not those of the columns.
struct Special {
  Special(int64_t sessions, int64_t positions, const std::optional<Tensor>& mask,
          const Column* first, bool zero_padding, int64_t padding_idx,
          const std::optional<Tensor>& offsets)
      : items(count_items(sessions, positions, offsets)),
        first(first),
        zero_padding(zero_padding),
        padding_idx(padding_idx) {
    CHECK(!zero_padding || first != nullptr, kOp, ": zero_padding needs an id column");
    if (!mask.has_value()) return;
    CHECK(mask->dim() == 2 && mask->size(0) == sessions && mask->size(1) == positions &&
              mask->scalar_type() == ScalarType::Bool,
          kOp, ": mask must be bool (", sessions, ", ", positions, ")");
    data = mask->const_data_ptr<bool>();
    place = Place(*mask, positions);
  }
  bool masked(int64_t i) const { return data != nullptr && data[place(i)]; }
  bool zero(int64_t i) const { return zero_padding && first->id(i) == padding_idx; }

  int64_t items;  // the others are zero, and none of them is asked for
  const Column* first;
  bool zero_padding;
  int64_t padding_idx;
  Place place;
  const bool* data = nullptr;
};

const Column* first_ids(const std::vector<Column>& columns) {
  for (const Column& c : columns) {
    if (c.has_table) return &c;
  }
  return nullptr;
}

}  // namespace
}  // namespace t4r_fast
