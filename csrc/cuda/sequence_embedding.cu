// sequence_embedding: a group of lanes copies one column of one position where it belongs, the
// mask vector and the zeros of padding included, in one launch. Backward sorts the positions of
// all tables by id; a row of a gradient is the sum of one run of equal ids, in the order of
// positions: first of pieces of at most kPiece entries, then of pieces. The mask vector is a table
// of one row. Packed sessions are one session up to their last offset, read on the device. No
// atomics on floats, no sizes that depend on data.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "radix_sort.cuh"

namespace t4r_fast {
namespace {

constexpr const char* kOp = "sequence_embedding";
// Descriptors of columns are arguments of kernels, at most 4 KiB in all.
constexpr int kMostColumns = 40;
// Blocks on a multiprocessor: at most 64 registers for a thread.
constexpr int kThreads = 256, kBlocks = 4;
constexpr uint32_t kPiece = kWarp;

template <typename S>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <typename Run>
void by_dtype(ScalarType type, const Run& run) {
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
  __device__ int64_t operator()(int64_t position) const {
    if (even) return position * stride_l;  // without divisions
    return position / positions * stride_b + position % positions * stride_l;
  }
  int64_t positions, stride_b, stride_l;
  bool even;
};

Place place_of(const Tensor& tensor) {
  const int64_t positions = tensor.size(1), b = tensor.stride(0), l = tensor.stride(1);
  return {positions, b, l, b == positions * l};
}

// Which positions are not those of the columns. The mask wins over padding.
struct Special {
  // Whether a position is read: those behind packed sessions are zero, and have no gradient. Asked
  // for each, for a limit that is kept takes registers from padded sessions too.
  __device__ bool inside(int64_t i) const { return end == nullptr || i < *end; }
  __device__ void check_end(int64_t count) const {
    DEVICE_CHECK(end == nullptr || (*end >= 0 && *end <= count),
                 "sequence_embedding: offsets must end at 0 to the items that there are");
  }
  __device__ bool masked(int64_t i) const { return mask != nullptr && mask[mask_place(i)]; }
  __device__ bool zero(int64_t i) const {
    return first_ids != nullptr && first_ids[first_place(i)] == padding_idx;
  }
  const bool* mask;
  const int64_t* first_ids;  // null without zero_padding
  Place mask_place, first_place;
  int64_t padding_idx;
  const int64_t* end;  // of packed sessions, else null
};

// A table and its ids (B, L), or numbers (B, L, width) without ids.
struct Column {
  const int64_t* ids;
  const char* data;
  Place place;
  int64_t rows, row_bytes, stride_w;
  int64_t start, width;  // elements of the output
  int copy_bytes, lanes;
};

// ---- forward

struct Forward {
  Column columns[kMostColumns];
  Special special;
  const char* vector;
  char* out;
  int64_t count, width;  // positions; elements of an output row
  int column_count, element_bytes, lanes;
};

__device__ int64_t checked_id(const int64_t* ids, const Place& place, int64_t rows, int64_t i) {
  const int64_t id = ids[place(i)];
  DEVICE_CHECK(id >= 0 && id < rows,
               "sequence_embedding: columns must hold ids from 0 to the rows of their table - 1");
  return id;
}

// The column's values of a position, and the distance from one to the next.
__device__ const char* source_of(const Column& c, int64_t i, int element_bytes, int64_t* stride) {
  *stride = 1;
  if (c.ids != nullptr) return c.data + checked_id(c.ids, c.place, c.rows, i) * c.row_bytes;
  *stride = c.stride_w;
  return c.data + c.place(i) * element_bytes;
}

// `bytes` are a multiple of the unit's, as are both addresses. No source: zeros.
template <typename Unit>
__device__ void copy(const char* from, int64_t stride, char* to, int64_t bytes, int lane,
                     int lanes) {
  const Unit* source = reinterpret_cast<const Unit*>(from);
  Unit* target = reinterpret_cast<Unit*>(to);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t k = lane; k < count; k += lanes) {
    target[k] = source == nullptr ? Unit{} : source[k * stride];
  }
}

// Columns in y; a group of c.lanes threads for each position.
__global__ void __launch_bounds__(kThreads, kBlocks)
    concat_kernel(const __grid_constant__ Forward f) {
  const Column& c = f.columns[blockIdx.y];
  const int lane = threadIdx.x % c.lanes, groups = kThreads / c.lanes;
  const int64_t step = int64_t{gridDim.x} * groups;
  f.special.check_end(f.count);
  for (int64_t i = int64_t{blockIdx.x} * groups + threadIdx.x / c.lanes; i < f.count; i += step) {
    int64_t stride = 1;
    const char* from = nullptr;
    if (f.special.inside(i)) {
      from = source_of(c, i, f.element_bytes, &stride);
      if (f.special.masked(i)) {
        from = f.vector + c.start * f.element_bytes;
        stride = 1;
      } else if (f.special.zero(i)) {
        from = nullptr;
      }
    }
    char* to = f.out + (i * f.width + c.start) * f.element_bytes;
    const int64_t bytes = c.width * f.element_bytes;
    switch (c.copy_bytes) {
      case 16:
        copy<uint4>(from, stride, to, bytes, lane, c.lanes);
        break;
      case 8:
        copy<uint2>(from, stride, to, bytes, lane, c.lanes);
        break;
      case 4:
        copy<uint32_t>(from, stride, to, bytes, lane, c.lanes);
        break;
      default:
        copy<uint16_t>(from, stride, to, bytes, lane, c.lanes);
    }
  }
}

template <typename S, int kWide>
struct alignas(sizeof(S) * kWide) Pack {
  S values[kWide];
};

// A group of f.lanes threads for each position, kWide elements at once; rounded once, also for 16
// bits.
template <typename S, int kWide>
__global__ void __launch_bounds__(kThreads, kBlocks) sum_kernel(const __grid_constant__ Forward f) {
  using T = typename SumOf<S>::type;
  using Values = Pack<S, kWide>;
  const int groups = kThreads / f.lanes;
  const int64_t step = int64_t{gridDim.x} * groups;
  f.special.check_end(f.count);
  for (int64_t i = int64_t{blockIdx.x} * groups + threadIdx.x / f.lanes; i < f.count; i += step) {
    const bool inside = f.special.inside(i), masked = inside && f.special.masked(i);
    const bool zero = !inside || f.special.zero(i);
    for (int64_t k = threadIdx.x % f.lanes * kWide; k < f.width; k += f.lanes * kWide) {
      T sums[kWide] = {};
      for (int column = 0; inside && column < f.column_count; ++column) {
        int64_t stride = 1;
        const char* source = source_of(f.columns[column], i, f.element_bytes, &stride);
        const S* from = reinterpret_cast<const S*>(source) + k * stride;
        const Values values = *reinterpret_cast<const Values*>(from);
        for (int j = 0; j < kWide; ++j) sums[j] += static_cast<T>(values.values[j]);
      }
      Values out{};
      if (masked) {
        out = *reinterpret_cast<const Values*>(reinterpret_cast<const S*>(f.vector) + k);
      } else if (!zero) {
        for (int j = 0; j < kWide; ++j) out.values[j] = static_cast<S>(sums[j]);
      }
      *reinterpret_cast<Values*>(reinterpret_cast<S*>(f.out) + i * f.width + k) = out;
    }
  }
}

// The largest power of two up to 16 that divides all of them.
template <typename... Numbers>
int common_bytes(Numbers... numbers) {
  const int64_t bits = (int64_t{16} | ... | static_cast<int64_t>(numbers));
  return static_cast<int>(bits & -bits);
}

int64_t address(const void* data) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
}

void check_column(const Tensor& first, const Tensor& column, const std::optional<Tensor>& table,
                  ScalarType type) {
  CHECK(column.dim() >= 2 && column.size(0) == first.size(0) && column.size(1) == first.size(1),
        kOp, ": columns must have shape (", first.size(0), ", ", first.size(1), ")");
  if (table.has_value()) {
    CHECK(column.dim() == 2 && table->dim() == 2, kOp, ": ids and tables must be matrices");
    CHECK_INT64(kOp, column);
    CHECK(table->scalar_type() == type, kOp, ": tables must share one dtype");
  } else {
    CHECK(column.dim() <= 3, kOp, ": numbers must have shape (B, L) or (B, L, W)");
    CHECK(column.scalar_type() == type, kOp, ": columns must have the dtype of the tables");
  }
}

// `table` is contiguous in its rows.
Column make_column(const Tensor& tensor, const Tensor* table) {
  Column c{};
  c.place = place_of(tensor);
  if (table != nullptr) {
    c.ids = tensor.const_data_ptr<int64_t>();
    c.data = static_cast<const char*>(table->const_data_ptr());
    c.rows = table->size(0);
    c.width = table->size(1);
    c.row_bytes = table->stride(0) * static_cast<int64_t>(table->element_size());
    c.stride_w = 1;
  } else {
    c.data = static_cast<const char*>(tensor.const_data_ptr());
    c.width = tensor.dim() == 3 ? tensor.size(2) : 1;
    c.stride_w = tensor.dim() == 3 ? tensor.stride(2) : 1;
  }
  return c;
}

// How many bytes of a column may be copied at once.
int copy_bytes(const Column& c, const Forward& f) {
  if (c.ids == nullptr && (c.stride_w != 1 || c.width == 1)) return f.element_bytes;
  const int64_t size = f.element_bytes;
  const int64_t step_b = c.ids != nullptr ? c.row_bytes : c.place.stride_b * size;
  const int64_t step_l = c.ids != nullptr ? c.row_bytes : c.place.stride_l * size;
  return common_bytes(address(c.data), step_b, step_l, c.start * size, c.width * size,
                      f.width * size, address(f.out), address(f.vector));
}

Special make_special(const Tensor& shape, const std::optional<Tensor>& mask, const Tensor* first,
                     bool zero_padding, int64_t padding_idx, const std::optional<Tensor>& packed) {
  Special special{};
  special.padding_idx = padding_idx;
  if (packed.has_value()) {
    const Tensor& offsets = *packed;
    CHECK_DIM(kOp, offsets, 1, "(B + 1,)");
    CHECK_INT64(kOp, offsets);
    CHECK(offsets.size(0) > 0 && shape.size(0) == 1, kOp,
          ": offsets must have one entry at least, and columns with them one session");
    CHECK(offsets.get_device_index() == shape.get_device_index(), kOp,
          ": offsets must be on device ", shape.get_device_index(), "; got ",
          offsets.get_device_index());
    special.end = offsets.const_data_ptr<int64_t>() + (offsets.size(0) - 1) * offsets.stride(0);
  }
  CHECK(!zero_padding || first != nullptr, kOp, ": zero_padding needs an id column");
  if (zero_padding) {
    special.first_ids = first->const_data_ptr<int64_t>();
    special.first_place = place_of(*first);
  }
  if (mask.has_value()) {
    CHECK(mask->dim() == 2 && mask->size(0) == shape.size(0) && mask->size(1) == shape.size(1) &&
              mask->scalar_type() == ScalarType::Bool,
          kOp, ": mask must be bool (", shape.size(0), ", ", shape.size(1), ")");
    special.mask = mask->const_data_ptr<bool>();
    special.mask_place = place_of(*mask);
  }
  return special;
}

// Lanes that copy n things: a power of two.
int lanes_for(int64_t n) {
  int lanes = 1;
  while (lanes < static_cast<int>(kWarp) && lanes < n) lanes *= 2;
  return lanes;
}

template <typename S>
void launch_sum(Forward* f, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(S);
  bool wide = true;
  for (int column = 0; column < f->column_count; ++column) {
    wide = wide && f->columns[column].copy_bytes == 16;
  }
  f->lanes = lanes_for(wide ? f->width / kWide : f->width);
  const unsigned grid = grid_for(f->count, kThreads / f->lanes);
  if (wide) {
    LAUNCH((sum_kernel<S, kWide>), grid, kThreads, 0, stream, *f);
  } else {
    LAUNCH((sum_kernel<S, 1>), grid, kThreads, 0, stream, *f);
  }
}

Tensor sequence_embedding_fwd_cuda(std::vector<Tensor> columns,
                                   std::vector<std::optional<Tensor>> tables, bool sum,
                                   std::optional<Tensor> mask, std::optional<Tensor> mask_vector,
                                   bool zero_padding, int64_t padding_idx,
                                   std::optional<Tensor> offsets) {
  CHECK(!columns.empty() && columns.size() == tables.size() && columns.size() <= kMostColumns, kOp,
        ": columns and tables must be equally many, 1 to ", kMostColumns, "; got ", columns.size(),
        " and ", tables.size());
  const Tensor& like = columns[0];
  const DeviceGuard guard(like.get_device_index());
  const Tensor *first = nullptr, *typed = &like;
  for (size_t c = columns.size(); c-- > 0;) {
    if (tables[c].has_value()) first = &columns[c], typed = &*tables[c];
  }
  const ScalarType type = typed->scalar_type();
  Forward f{};
  f.special = make_special(like, mask, first, zero_padding, padding_idx, offsets);
  f.element_bytes = static_cast<int>(typed->element_size());
  f.column_count = static_cast<int>(columns.size());
  f.count = like.size(0) * like.size(1);
  std::vector<Tensor> kept;  // contiguous copies, alive until the launch
  for (size_t i = 0; i < columns.size(); ++i) {
    check_column(like, columns[i], tables[i], type);
    const bool copied =
        tables[i].has_value() && tables[i]->size(1) > 1 && tables[i]->stride(1) != 1;
    if (tables[i].has_value()) {
      kept.push_back(copied ? torch::stable::contiguous(*tables[i]) : *tables[i]);
    }
    f.columns[i] = make_column(columns[i], tables[i].has_value() ? &kept.back() : nullptr);
    f.columns[i].start = sum ? 0 : f.width;
    CHECK(!sum || f.columns[i].width == f.columns[0].width, kOp,
          ": aggregation 'sum' needs columns of one width");
    f.width = sum ? f.columns[0].width : f.width + f.columns[i].width;
  }
  CHECK(mask.has_value() == mask_vector.has_value(), kOp,
        ": mask and mask_vector must be given together");
  if (mask_vector.has_value()) {
    CHECK(mask_vector->dim() == 1 && mask_vector->size(0) == f.width &&
              mask_vector->scalar_type() == type,
          kOp, ": mask_vector must have shape (", f.width, ",) and the dtype of the tables");
    kept.push_back(torch::stable::contiguous(*mask_vector));
    f.vector = static_cast<const char*>(kept.back().const_data_ptr());
  }
  Tensor out = torch::stable::new_empty(like, {like.size(0), like.size(1), f.width}, type);
  if (f.count == 0 || f.width == 0) return out;
  f.out = static_cast<char*>(out.mutable_data_ptr());
  int widest = 1;
  for (Column* c = f.columns; c < f.columns + f.column_count; ++c) {
    c->copy_bytes = copy_bytes(*c, f);
    c->lanes = lanes_for(c->width * f.element_bytes / c->copy_bytes);
    widest = std::max(widest, c->lanes);
  }
  const cudaStream_t stream = current_stream(like);
  if (sum) {
    by_dtype(type, [&](auto kind) { launch_sum<decltype(kind)>(&f, stream); });
  } else {
    const dim3 grid(grid_for(f.count, kThreads / widest), f.column_count);
    LAUNCH(concat_kernel, grid, kThreads, 0, stream, f);
  }
  return out;
}

// ---- backward

// What is sorted: the ids of a table, or the mask as ids of a table of one row.
struct Sorted {
  const int64_t* ids;  // null: the mask
  Place place;
  uint32_t rows;  // also the key of positions without a gradient
};

struct Keys {
  Sorted lists[kMostColumns + 1];
  Special special;
  Lists entries;
  uint32_t n;
};

// Lists in y.
__global__ void __launch_bounds__(kThreads, kBlocks) keys_kernel(const __grid_constant__ Keys k) {
  const Sorted& list = k.lists[blockIdx.y];
  const size_t at = size_t{blockIdx.y} * k.n;
  k.special.check_end(k.n);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < k.n;
       i += int64_t{gridDim.x} * kThreads) {
    const bool inside = k.special.inside(i), masked = inside && k.special.masked(i);
    uint32_t key = list.rows;
    if (!inside) {
      // no gradient
    } else if (list.ids == nullptr) {
      if (masked) key = 0;
    } else if (!masked && !k.special.zero(i) && list.ids[list.place(i)] != k.special.padding_idx) {
      key = static_cast<uint32_t>(checked_id(list.ids, list.place, list.rows, i));
    }
    k.entries.keys[at + i] = key;
    k.entries.positions[at + i] = static_cast<uint32_t>(i);
  }
}

// A gradient (rows, width), or as many rows as entries, ids with them.
struct Gradient {
  void* values;
  int64_t* ids;  // null: dense
  void* pieces;  // (2 per kPiece entries, width) sums of pieces of rows that go on
  int64_t start, width, filler;
  uint32_t rows;
};

struct Sums {
  Gradient lists[kMostColumns + 1];
  Lists entries;
  const void* dout;
  int64_t row_width;
  uint32_t n;
};

// The entry's row in values.
template <typename S>
__device__ S* row_of(const Gradient& g, uint32_t key, uint32_t entry) {
  return static_cast<S*>(g.values) + (g.ids == nullptr ? key : entry) * g.width;
}

// A warp for each entry (x) and list (y). It sums what starts there: the entries of one key up to
// the next multiple of kPiece. A sum that is the whole row is written, others go to pieces: of
// kPiece entries the one at the start may go on from before, and one may go on behind the end.
// With ids, entries that start no row are rows of zeros: of the same id, or of the filler.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_pieces_kernel(const __grid_constant__ Sums s) {
  using T = typename SumOf<S>::type;
  const Gradient& g = s.lists[blockIdx.y];
  const uint32_t* keys = s.entries.keys + size_t{blockIdx.y} * s.n;
  const uint32_t* positions = s.entries.positions + size_t{blockIdx.y} * s.n;
  const uint32_t lane = threadIdx.x % kWarp;
  constexpr int64_t kWarps = kThreads / kWarp;
  for (int64_t e = blockIdx.x * kWarps + threadIdx.x / kWarp; e < s.n; e += gridDim.x * kWarps) {
    const uint32_t entry = static_cast<uint32_t>(e), key = keys[entry];
    const bool head = entry == 0 || keys[entry - 1] != key, none = key == g.rows;
    if (g.ids != nullptr) {
      if (lane == 0) g.ids[entry] = none ? g.filler : key;
      if (none || !head) {
        S* row = row_of<S>(g, key, entry);
        for (int64_t k = lane; k < g.width; k += kWarp) row[k] = S(0);
      }
    }
    if (none || !(head || entry % kPiece == 0)) continue;
    const uint32_t limit = min(s.n, (entry / kPiece + 1) * kPiece), mine = entry + lane;
    const bool in_piece = mine < limit && keys[mine] == key;
    const uint32_t position = in_piece ? positions[mine] : 0;
    const int length = __popc(__ballot_sync(kAllLanes, in_piece));
    const uint32_t stop = entry + length;
    const bool whole = head && (stop == s.n || keys[stop] != key);
    S* row = row_of<S>(g, key, entry);
    T* piece = static_cast<T*>(g.pieces) + (entry / kPiece * 2 + (entry % kPiece != 0)) * g.width;
    const S* dout = static_cast<const S*>(s.dout) + g.start;
    for (int64_t first = 0; first < g.width; first += kWarp) {
      const int64_t k = first + lane;
      T sum = 0;
#pragma unroll 4
      for (int j = 0; j < length; ++j) {
        const int64_t at = __shfl_sync(kAllLanes, position, j);
        if (k < g.width) sum += static_cast<T>(dout[at * s.row_width + k]);
      }
      if (k < g.width) {
        if (whole) {
          row[k] = static_cast<S>(sum);
        } else {
          piece[k] = sum;
        }
      }
    }
  }
}

// A block for each kPiece entries (x) and list (y): the row that starts there and goes on behind
// the end, from its pieces.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_rows_kernel(const __grid_constant__ Sums s) {
  using T = typename SumOf<S>::type;
  const Gradient& g = s.lists[blockIdx.y];
  const uint32_t* keys = s.entries.keys + size_t{blockIdx.y} * s.n;
  const uint32_t lane = threadIdx.x % kWarp;
  for (int64_t c = blockIdx.x; (c + 1) * kPiece < s.n; c += gridDim.x) {
    const uint32_t first = static_cast<uint32_t>(c) * kPiece, next = first + kPiece;
    const uint32_t key = keys[next - 1];
    const bool goes_on = keys[next] == key, began_before = first > 0 && keys[first - 1] == key;
    if (key == g.rows || !goes_on || began_before) continue;
    const uint32_t same = __ballot_sync(kAllLanes, keys[first + lane] == key);
    const uint32_t entry = first + __ffs(static_cast<int>(same)) - 1;
    S* row = row_of<S>(g, key, entry);
    const T* pieces = static_cast<const T*>(g.pieces);
    for (int64_t k = threadIdx.x; k < g.width; k += kThreads) {
      T sum = pieces[(first / kPiece * 2 + (entry % kPiece != 0)) * g.width + k];
      for (uint32_t at = next; at < s.n && keys[at] == key; at += kPiece) {
        sum += pieces[at / kPiece * 2 * g.width + k];
      }
      row[k] = static_cast<S>(sum);
    }
  }
}

struct Numbers {
  struct Column {
    void* out;
    int64_t start, width;
    int lanes;
  } columns[kMostColumns];
  Special special;
  const void* dout;
  int64_t count, row_width;
};

// Columns in y; a group of c.lanes threads for each position.
template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    numbers_kernel(const __grid_constant__ Numbers f) {
  const auto& c = f.columns[blockIdx.y];
  const int groups = kThreads / c.lanes;
  const int64_t step = int64_t{gridDim.x} * groups;
  f.special.check_end(f.count);
  for (int64_t i = int64_t{blockIdx.x} * groups + threadIdx.x / c.lanes; i < f.count; i += step) {
    const bool none = !f.special.inside(i) || f.special.masked(i) || f.special.zero(i);
    const S* from = static_cast<const S*>(f.dout) + i * f.row_width + c.start;
    S* to = static_cast<S*>(c.out) + i * c.width;
    for (int64_t k = threadIdx.x % c.lanes; k < c.width; k += c.lanes) {
      to[k] = none ? S(0) : from[k];
    }
  }
}

struct Backward {
  Keys keys{};
  Sums sums{};
  Numbers numbers{};
  unsigned sorted = 0, number_columns = 0;
  int64_t summed_width = 0;
  int most_lanes = 1;  // of the columns of numbers
  uint32_t most_rows = 1;
  std::vector<Tensor> kept;

  void add(const Sorted& list, const Gradient& gradient) {
    keys.lists[sorted] = list;
    sums.lists[sorted] = gradient;
    sums.lists[sorted++].rows = list.rows;
    summed_width += gradient.width;
    most_rows = std::max(most_rows, list.rows);
  }

  template <typename S>
  void run(const Tensor& dout, cudaStream_t stream);
};

template <typename S>
void Backward::run(const Tensor& dout, cudaStream_t stream) {
  const uint32_t n = keys.n;
  if (n == 0) return;
  if (number_columns > 0) {
    const dim3 grid(grid_for(n, kThreads / most_lanes), number_columns);
    LAUNCH(numbers_kernel<S>, grid, kThreads, 0, stream, numbers);
  }
  if (sorted == 0) return;
  const int64_t entries = int64_t{sorted} * n;
  Tensor lists = torch::stable::new_empty(dout, {4, entries}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(dout, {sorted, sort_tiles(n), kDigits}, ScalarType::Int);
  const int64_t piece_rows = (int64_t{n} + kPiece - 1) / kPiece * 2;
  constexpr bool kDouble = sizeof(typename SumOf<S>::type) == 8;
  Tensor pieces = torch::stable::new_empty(dout, {piece_rows * summed_width},
                                           kDouble ? ScalarType::Double : ScalarType::Float);
  using T = typename SumOf<S>::type;
  T* piece = static_cast<T*>(pieces.mutable_data_ptr());
  for (Gradient* g = sums.lists; g < sums.lists + sorted; ++g) {
    g->pieces = piece;
    piece += piece_rows * g->width;
  }
  uint32_t* data = static_cast<uint32_t*>(lists.mutable_data_ptr());
  keys.entries = {data, data + entries};
  LAUNCH(keys_kernel, dim3(grid_for(n, kThreads), sorted), kThreads, 0, stream, keys);
  int bits = 1;
  while (bits < 32 && most_rows >> bits != 0) ++bits;
  const Lists spare{data + 2 * entries, data + 3 * entries};
  sums.entries = sort_lists(keys.entries, spare, static_cast<uint32_t*>(counts.mutable_data_ptr()),
                            sorted, n, bits, stream);
  sums.dout = dout.const_data_ptr();
  sums.n = n;
  const dim3 warps(grid_for(n, kThreads / kWarp), sorted), blocks(grid_for(n, kPiece), sorted);
  LAUNCH(sum_pieces_kernel<S>, warps, kThreads, 0, stream, sums);
  LAUNCH(sum_rows_kernel<S>, blocks, kThreads, 0, stream, sums);
}

// The gradient of a table: dense zeros and rows, or a row for each entry.
Gradient make_gradient(const Tensor& dout, int64_t count, int64_t rows, int64_t width, bool sparse,
                       int64_t padding_idx, Tensor* ids, Tensor* values) {
  Gradient g{};
  g.width = width;
  if (sparse) {
    CHECK(rows > 0 || count == 0, kOp, ": a table without rows has no ids");
    *ids = torch::stable::new_empty(dout, {count}, ScalarType::Long);
    *values = torch::stable::new_empty(dout, {count, width});
    g.ids = ids->mutable_data_ptr<int64_t>();
    g.filler = padding_idx >= 0 && padding_idx < rows ? padding_idx : 0;
  } else {
    *values = torch::stable::new_zeros(dout, {rows, width});
  }
  g.values = values->mutable_data_ptr();
  return g;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> sequence_embedding_bwd_cuda(
    Tensor dout_in, std::vector<std::optional<Tensor>> columns, std::vector<int64_t> rows,
    std::vector<int64_t> widths, bool sum, std::optional<Tensor> mask, bool zero_padding,
    int64_t padding_idx, bool sparse, std::vector<int64_t> needs, std::optional<Tensor> offsets) {
  const size_t count = columns.size();
  CHECK(dout_in.dim() == 3, kOp, ": dout must have shape (B, L, W)");
  CHECK(count > 0 && count <= kMostColumns && rows.size() == count && widths.size() == count &&
            needs.size() == count + 1,
        kOp, ": rows, widths and needs must be those of the columns, at most ", kMostColumns);
  const DeviceGuard guard(dout_in.get_device_index());
  const Tensor dout = torch::stable::contiguous(dout_in);
  const int64_t n = dout.size(0) * dout.size(1);
  CHECK(n < UINT32_MAX, kOp, ": B * L must be below 2**32 - 1; got ", n);
  const Tensor* first = nullptr;
  for (size_t f = count; f-- > 0;) {
    if (columns[f].has_value()) first = &*columns[f];
  }
  const Special special = make_special(dout, mask, first, zero_padding, padding_idx, offsets);
  Backward b;
  b.keys.special = b.numbers.special = special;
  b.keys.n = static_cast<uint32_t>(n);
  b.sums.row_width = b.numbers.row_width = dout.size(2);
  b.numbers.dout = dout.const_data_ptr();
  b.numbers.count = n;
  std::vector<Tensor> ids, gradients;
  int64_t start = 0;
  for (size_t f = 0; f < count; ++f) {
    Tensor column_ids = torch::stable::new_empty(dout, {0}, ScalarType::Long);
    Tensor values = torch::stable::new_empty(dout, {0});
    CHECK(widths[f] >= 0 && start + widths[f] <= dout.size(2), kOp, ": dout must hold all columns");
    if (columns[f].has_value()) {
      check_column(dout, *columns[f], std::nullopt, ScalarType::Long);
      CHECK_DIM(kOp, *columns[f], 2, "(B, L)");
    }
    if (needs[f] && columns[f].has_value()) {
      CHECK(rows[f] >= 0 && rows[f] < UINT32_MAX, kOp,
            ": tables must have less than 2**32 - 1 rows");
      Gradient g =
          make_gradient(dout, n, rows[f], widths[f], sparse, padding_idx, &column_ids, &values);
      g.start = start;
      b.add({columns[f]->const_data_ptr<int64_t>(), place_of(*columns[f]),
             static_cast<uint32_t>(rows[f])},
            g);
    } else if (needs[f]) {
      values = torch::stable::new_empty(dout, {dout.size(0), dout.size(1), widths[f]});
      const int lanes = lanes_for(widths[f]);
      b.numbers.columns[b.number_columns++] = {values.mutable_data_ptr(), start, widths[f], lanes};
      b.most_lanes = std::max(b.most_lanes, lanes);
    }
    if (!sum) start += widths[f];
    ids.push_back(column_ids);
    gradients.push_back(values);
  }
  Tensor vector = torch::stable::new_empty(dout, {0});
  if (needs[count]) {
    Tensor none;
    const int64_t width = dout.size(2);
    b.add({nullptr, {}, 1}, make_gradient(dout, n, 1, width, false, 0, &none, &vector));
    vector = torch::stable::view(vector, {width});
  }
  const cudaStream_t stream = current_stream(dout);
  by_dtype(dout.scalar_type(), [&](auto kind) { b.run<decltype(kind)>(dout, stream); });
  return {ids, gradients, vector};
}

}  // namespace
}  // namespace t4r_fast

REGISTER_OPS(m) {
  m.impl("sequence_embedding_fwd", TORCH_BOX(&t4r_fast::sequence_embedding_fwd_cuda));
  m.impl("sequence_embedding_bwd", TORCH_BOX(&t4r_fast::sequence_embedding_bwd_cuda));
}
