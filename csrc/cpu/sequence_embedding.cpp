// sequence_embedding: one pass over the positions writes all columns where they belong, the [MASK]
// vector and the zeros included. Backward sorts the positions of a table by id; a row of the
// gradient is the sum of one segment, in the order of positions, and is written once.
#include <atomic>
#include <cstring>
#include <tuple>

#include "radix_sort.h"
#include "sequence_embedding_layout.h"

namespace t4r_fast {
namespace {

// A position takes some 50 ns for each column.
constexpr int64_t kPositionsPerThread = 256, kSegmentsPerThread = 128;
// Rows on their way while one is copied: random rows come at the memory's latency.
constexpr int64_t kAhead = 12;

inline bool has_row(const Column& c, int64_t id) {
  return __builtin_expect(id >= 0 && id < c.rows, 1);
}

// The first id that is outside its table.
[[gnu::cold, gnu::noinline]] void refuse_ids(const std::vector<Column>& columns, int64_t count) {
  for (size_t f = 0; f < columns.size(); ++f) {
    const Column& c = columns[f];
    for (int64_t i = 0; c.has_table && i < count; ++i) {
      CHECK(has_row(c, c.id(i)), kOp, ": columns[", f, "] must hold ids from 0 to ", c.rows - 1,
            " (tables[", f, "] has ", c.rows, " rows); got ", c.id(i), " at position (",
            i / c.place.positions, ", ", i % c.place.positions, ")");
    }
  }
}

// copy(position, row of the table) for ids that have a row; whether all have. An exception of a
// work item would lose its message on the way through parallel_for. The column by value: what is
// written might be it, for all that the compiler knows, which made this loop three times slower.
template <typename Copy>
bool for_rows(const Column c, int64_t i, int64_t stop, int64_t last, const Copy& copy) {
  const int64_t bytes = c.width * c.size;
  bool all = true;
  for (; i < stop; ++i) {
    if (i + kAhead < last) {
      const char* ahead = c.row(c.id(i + kAhead));  // any address may be prefetched
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at);
    }
    const int64_t id = c.id(i);
    if (has_row(c, id)) {
      copy(i, c.row(id));
    } else {
      all = false;
    }
  }
  return all;
}

template <typename S>
void copy_numbers(const Column& c, int64_t position, S* out) {
  const S* from = reinterpret_cast<const S*>(c.number(position));
  for (int64_t k = 0; k < c.width; ++k) out[k] = from[k * c.stride_w];
}

// A tile of positions, column after column: `out` is its first row. Whether all ids have a row.
template <typename S>
bool write_concat(const Layout& layout, int64_t first, int64_t stop, int64_t last, S* out) {
  const int64_t width = layout.width;
  bool all = true;
  for (const Column& c : layout.columns) {
    S* const to = out + c.start;
    if (!c.has_table) {
      for (int64_t i = first; i < stop; ++i) copy_numbers(c, i, to + (i - first) * width);
    } else {
      const size_t bytes = static_cast<size_t>(c.width * c.size);
      all &= for_rows(c, first, stop, last, [=](int64_t i, const char* row) {
        std::memcpy(to + (i - first) * width, row, bytes);
      });
    }
  }
  return all;
}

// Rounded once, also for 16 bits.
template <typename S, typename T>
bool write_sum(const Layout& layout, int64_t first, int64_t stop, int64_t last, T* sums, S* numbers,
               S* out) {
  const int64_t width = layout.width;
  bool all = true;
  std::fill_n(sums, (stop - first) * width, T(0));
  const auto add = [=](int64_t i, const S* from) {
    T* to = sums + (i - first) * width;
    for (int64_t k = 0; k < width; ++k) to[k] += static_cast<T>(from[k]);
  };
  for (const Column& c : layout.columns) {
    if (c.has_table) {
      all &= for_rows(c, first, stop, last,
                      [&](int64_t i, const char* row) { add(i, reinterpret_cast<const S*>(row)); });
    } else {
      for (int64_t i = first; i < stop; ++i) {
        copy_numbers(c, i, numbers);
        add(i, numbers);
      }
    }
  }
  for (int64_t k = 0; k < (stop - first) * width; ++k) out[k] = static_cast<S>(sums[k]);
  return all;
}

template <typename S>
void forward(const Layout& layout, const Special& special, bool sum, const S* vector, S* out) {
  using T = typename SumOf<S>::type;
  constexpr int64_t kTile = 64;
  const int64_t count = special.items, width = layout.width;
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, count, kPositionsPerThread, [&](int64_t first, int64_t last) {
    std::vector<T> sums(static_cast<size_t>(sum ? kTile * width : 0));
    std::vector<S> numbers(static_cast<size_t>(sum ? width : 0));
    for (; first < last; first += kTile) {
      const int64_t stop = std::min(first + kTile, last);
      S* const rows = out + first * width;
      const bool all = sum ? write_sum(layout, first, stop, last, sums.data(), numbers.data(), rows)
                           : write_concat(layout, first, stop, last, rows);
      if (!all) wrong.store(true, std::memory_order_relaxed);
      if (vector == nullptr && !special.zero_padding) continue;
      for (int64_t i = first; i < stop; ++i) {
        if (special.masked(i)) {
          std::copy_n(vector, width, rows + (i - first) * width);
        } else if (special.zero(i)) {
          std::fill_n(rows + (i - first) * width, width, S(0));
        }
      }
    }
  });
  if (wrong.load(std::memory_order_relaxed)) refuse_ids(layout.columns, count);
  std::fill(out + count * width, out + layout.sessions * layout.positions * width, S(0));
}

Tensor sequence_embedding_fwd_cpu(std::vector<Tensor> columns,
                                  std::vector<std::optional<Tensor>> tables, bool sum,
                                  std::optional<Tensor> mask, std::optional<Tensor> mask_vector,
                                  bool zero_padding, int64_t padding_idx,
                                  std::optional<Tensor> offsets) {
  const Layout layout(columns, tables, sum);
  const Special special(layout.sessions, layout.positions, mask, first_ids(layout.columns),
                        zero_padding, padding_idx, offsets);
  std::optional<Tensor> vector;
  CHECK(mask.has_value() == mask_vector.has_value(), kOp,
        ": mask and mask_vector must be given together");
  if (mask_vector.has_value()) {
    CHECK(mask_vector->dim() == 1 && mask_vector->size(0) == layout.width &&
              mask_vector->scalar_type() == layout.type,
          kOp, ": mask_vector must have shape (", layout.width, ",) and the dtype of the tables");
    vector = torch::stable::contiguous(*mask_vector);
  }
  Tensor out = torch::stable::new_empty(
      columns[0], {layout.sessions, layout.positions, layout.width}, layout.type);
  by_dtype(layout.type, [&](auto kind) {
    using S = decltype(kind);
    forward<S>(layout, special, sum,
               vector ? static_cast<const S*>(vector->const_data_ptr()) : nullptr,
               static_cast<S*>(out.mutable_data_ptr()));
  });
  return out;
}

// ---- backward

// Sums of rows of dout as sums of sums: one long sum would round each time.
template <typename S>
class RowSum {
 public:
  using T = typename SumOf<S>::type;
  explicit RowSum(int64_t width) : part_(width), total_(width) {}

  void add(const S* row) {
    if (added_ % kPart == 0 && added_ > 0) fold();
    for (size_t k = 0; k < part_.size(); ++k) part_[k] += static_cast<T>(row[k]);
    ++added_;
  }
  void write(S* out) {
    const bool folded = added_ > kPart;
    if (folded) fold();
    const std::vector<T>& sum = folded ? total_ : part_;
    for (size_t k = 0; k < sum.size(); ++k) out[k] = static_cast<S>(sum[k]);
    std::fill(part_.begin(), part_.end(), T(0));
    if (folded) std::fill(total_.begin(), total_.end(), T(0));
    added_ = 0;
  }

 private:
  static constexpr int64_t kPart = 64;
  void fold() {
    for (size_t k = 0; k < part_.size(); ++k) total_[k] += part_[k];
    std::fill(part_.begin(), part_.end(), T(0));
  }
  std::vector<T> part_, total_;
  int64_t added_ = 0;
};

struct Gradient {
  Tensor ids, values;
};

// Of the rows of a table: the ids that occur and theirs, or all rows with zeros elsewhere.
template <typename S>
Gradient table_gradient(const Tensor& dout, const Column& c, const Special& special, int64_t width,
                        bool sparse) {
  const int64_t count = special.items;
  std::vector<IdAt> entries, spare;
  entries.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    if (special.masked(i) || special.zero(i) || c.id(i) == special.padding_idx) continue;
    CHECK(has_row(c, c.id(i)), kOp, ": columns must hold ids from 0 to ", c.rows - 1, "; got ",
          c.id(i), " at position (", i / dout.size(1), ", ", i % dout.size(1), ")");
    entries.push_back({c.id(i), i});
  }
  sort_by_id(entries, spare);
  std::vector<int64_t> first;  // entry of each segment
  for (size_t e = 0; e < entries.size(); ++e) {
    if (e == 0 || entries[e].id != entries[e - 1].id) first.push_back(static_cast<int64_t>(e));
  }
  const int64_t segments = static_cast<int64_t>(first.size());
  first.push_back(static_cast<int64_t>(entries.size()));
  const ScalarType type = dout.scalar_type();
  Gradient out{torch::stable::new_empty(dout, {sparse ? segments : 0}, ScalarType::Long),
               sparse ? torch::stable::new_empty(dout, {segments, c.width}, type)
                      : torch::stable::new_zeros(dout, {c.rows, c.width}, type)};
  int64_t* ids = sparse ? out.ids.mutable_data_ptr<int64_t>() : nullptr;
  S* values = static_cast<S*>(out.values.mutable_data_ptr());
  const S* from = static_cast<const S*>(dout.const_data_ptr()) + c.start;
  torch::stable::parallel_for(0, segments, kSegmentsPerThread, [&](int64_t s, int64_t stop) {
    RowSum<S> sum(c.width);
    for (; s < stop; ++s) {
      const int64_t id = entries[first[s]].id;
      if (first[s + 1] - first[s] == 1) {
        std::copy_n(from + entries[first[s]].at * width, c.width,
                    values + (sparse ? s : id) * c.width);
      } else {
        for (int64_t e = first[s]; e < first[s + 1]; ++e) sum.add(from + entries[e].at * width);
        sum.write(values + (sparse ? s : id) * c.width);
      }
      if (sparse) ids[s] = id;
    }
  });
  return out;
}

template <typename S>
Tensor number_gradient(const Tensor& dout, const Column& c, const Special& special, int64_t width) {
  Tensor out = torch::stable::new_empty(dout, {dout.size(0), dout.size(1), c.width});
  S* to = static_cast<S*>(out.mutable_data_ptr());
  const S* from = static_cast<const S*>(dout.const_data_ptr()) + c.start;
  torch::stable::parallel_for(0, special.items, kPositionsPerThread, [&](int64_t i, int64_t stop) {
    for (; i < stop; ++i) {
      if (special.masked(i) || special.zero(i)) {
        std::fill_n(to + i * c.width, c.width, S(0));
      } else {
        std::copy_n(from + i * width, c.width, to + i * c.width);
      }
    }
  });
  std::fill(to + special.items * c.width, to + out.numel(), S(0));
  return out;
}

template <typename S>
Tensor vector_gradient(const Tensor& dout, const Special& special, int64_t width) {
  Tensor out = torch::stable::new_empty(dout, {width});
  const S* from = static_cast<const S*>(dout.const_data_ptr());
  RowSum<S> sum(width);
  for (int64_t i = 0; i < special.items; ++i) {
    if (special.masked(i)) sum.add(from + i * width);
  }
  sum.write(static_cast<S*>(out.mutable_data_ptr()));
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> sequence_embedding_bwd_cpu(
    Tensor dout_in, std::vector<std::optional<Tensor>> id_columns, std::vector<int64_t> rows,
    std::vector<int64_t> widths, bool sum, std::optional<Tensor> mask, bool zero_padding,
    int64_t padding_idx, bool sparse, std::vector<int64_t> needs, std::optional<Tensor> offsets) {
  const size_t count = id_columns.size();
  CHECK(dout_in.dim() == 3, kOp, ": dout must have shape (B, L, W)");
  CHECK(count > 0 && rows.size() == count && widths.size() == count && needs.size() == count + 1,
        kOp, ": rows, widths and needs must be those of the columns");
  const Tensor dout = torch::stable::contiguous(dout_in);
  const int64_t sessions = dout.size(0), positions = dout.size(1), width = dout.size(2);
  std::vector<Column> columns;
  int64_t start = 0;
  for (size_t f = 0; f < count; ++f) {
    Column c{};
    c.rows = rows[f];
    c.width = widths[f];
    c.start = sum ? 0 : start;
    start += widths[f];
    CHECK(c.width >= 0 && c.start + c.width <= width, kOp, ": dout must hold all columns");
    if (id_columns[f].has_value()) {
      const Tensor& ids = *id_columns[f];
      CHECK(ids.dim() == 2 && ids.size(0) == sessions && ids.size(1) == positions, kOp,
            ": columns must have shape (", sessions, ", ", positions, ")");
      CHECK_INT64(kOp, ids);
      c.has_table = true;
      c.ids = ids.const_data_ptr<int64_t>();
      c.place = Place(ids, positions);
    }
    columns.push_back(c);
  }
  const Special special(sessions, positions, mask, first_ids(columns), zero_padding, padding_idx,
                        offsets);
  std::vector<Tensor> ids, gradients;
  Tensor vector = torch::stable::new_empty(dout, {0});
  by_dtype(dout.scalar_type(), [&](auto kind) {
    using S = decltype(kind);
    for (size_t f = 0; f < count; ++f) {
      Gradient g{torch::stable::new_empty(dout, {0}, ScalarType::Long),
                 torch::stable::new_empty(dout, {0})};
      if (needs[f] && columns[f].has_table) {
        g = table_gradient<S>(dout, columns[f], special, width, sparse);
      } else if (needs[f]) {
        g.values = number_gradient<S>(dout, columns[f], special, width);
      }
      ids.push_back(g.ids);
      gradients.push_back(g.values);
    }
    if (needs[count]) vector = vector_gradient<S>(dout, special, width);
  });
  return {ids, gradients, vector};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("sequence_embedding_fwd", TORCH_BOX(&t4r_fast::sequence_embedding_fwd_cpu));
  m.impl("sequence_embedding_bwd", TORCH_BOX(&t4r_fast::sequence_embedding_bwd_cpu));
}
