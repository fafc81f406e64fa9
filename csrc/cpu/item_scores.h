// Scores of a tile of items for a panel of rows, and the two products of the backward pass: the
// register-blocked loops that the item ops share. Included by files for one instruction set after
// simd_<set>.h; everything is in an unnamed namespace, or the linker may keep the wide copy of a
// function for everybody.
#pragma once

#include <stdint.h>

#include "float_types.h"
#include "item_table.h"

namespace {

using t4r_fast::ItemTable;
using t4r_fast::kBlock;
using t4r_fast::kBlockStride;
using t4r_fast::kChunk;
using t4r_fast::kFewRows;
using t4r_fast::kPanel;
using t4r_fast::kTile;
using t4r_fast::PackedRows;

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? static_cast<T>(-__FLT_MAX__) : static_cast<T>(-__DBL_MAX__);

// Sums of exp(z - top) move to a new top only where a score exceeds the old one by this much: e^8
// is far from overflow, and nearly all tiles go without.
constexpr int kSlack = 8;

template <typename T>
inline bool is_type(Dtype dtype) {
  return dtype == (sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64);
}

// ---- packing

// The columns of the chunk that begins at `column`.
ALWAYS_INLINE int64_t chunk_width(int64_t chunk, int64_t padded, int64_t column) {
  return padded - column < chunk ? padded - column : chunk;
}

template <typename T>
ALWAYS_INLINE int64_t chunk_width(int64_t padded, int64_t column) {
  return chunk_width(kChunk<T>, padded, column);
}

template <class X>
void pack_rows(const Matrix& from, const int64_t* source, const PackedRows<typename X::T>& to) {
  using T = typename X::T;
  constexpr int kGroup = X::kWide * X::L;
  for (int64_t i = 0; i < to.count; ++i) {
    for (int64_t column = 0; column < to.padded; column += to.chunk) {
      const int64_t chunk = chunk_width(to.chunk, to.padded, column);
      const int64_t real = to.width - column < chunk ? to.width - column : chunk;
      T* row = to.rows + column * to.count + i * chunk;
      convert(from, source[i] * from.stride + column, real, row);
      for (int64_t k = real; k < chunk; ++k) row[k] = 0;
    }
  }
  const int64_t lanes = (to.count + X::L - 1) / X::L * X::L;
  for (int64_t start = 0, group; start < lanes; start += group) {
    const int64_t panel_end = (start / kPanel<T> + 1) * kPanel<T>;
    const int64_t left = (panel_end < lanes ? panel_end : lanes) - start;
    group = left < kGroup ? left : kGroup;
    T* out = to.panels + start * to.width;
    for (int64_t k = 0; k < to.width; ++k) {
      const int64_t column = k / to.chunk * to.chunk;
      const int64_t chunk = chunk_width(to.chunk, to.padded, column);
      const T* in = to.rows + column * to.count + start * chunk + (k - column);
      for (int64_t r = 0; r < group; ++r) {
        out[k * group + r] = start + r < to.count ? in[r * chunk] : 0;
      }
    }
  }
}

// ---- sums of exponentials

// Where the highest of new scores exceeds a row's top by more than kSlack it becomes the top, and
// factor is what the row's sums are to be multiplied by. False if no row has one; factor is not
// written then. A row's top does not depend on its neighbours in the vector.
template <class X>
ALWAYS_INLINE bool raise_top(typename X::V highest, typename X::T* top, typename X::T* factor) {
  const typename X::V old = X::load(top);
  const typename X::M higher = X::greater(highest, X::add(old, X::set1(kSlack)));
  if (!X::bits(higher)) return false;
  const typename X::V raised = X::select(higher, highest, old);
  X::store(factor, X::exp(X::sub(old, raised)));
  X::store(top, raised);
  return true;
}

// ---- tiles of items

template <typename T>
struct Tile {
  const T* items;
  int64_t stride;  // from item to item
  int64_t padded, first;
  int count;
  bool in_chunks;  // of columns, kTile items in each; without a stride
  const T* bias;   // kTile entries, or null
  // The tile to prefetch, in bytes; no width, no prefetching.
  uintptr_t next;
  int64_t next_stride, next_width;
};

inline int64_t item_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// The items [index * kTile, ...) as they lie where that is possible, else converted to `copy`
// (kTile x padded) with zeros past the table's width and end. `apart` tiles further is the one to
// prefetch.
template <typename T>
Tile<T> load_tile(const ItemTable& table, int64_t index, int64_t padded, T* copy, T* bias,
                  int64_t apart = 1) {
  Tile<T> tile;
  tile.first = index * kTile;
  tile.padded = padded;
  tile.count =
      static_cast<int>(table.count - tile.first < kTile ? table.count - tile.first : kTile);
  const Matrix& items = table.items;
  const int64_t bytes = item_bytes(items.dtype);
  tile.next_stride = items.stride * bytes;
  tile.next_width = table.width * bytes;
  tile.next = reinterpret_cast<uintptr_t>(items.data) +
              static_cast<uintptr_t>((tile.first + apart * kTile) * tile.next_stride);
  if (is_type<T>(items.dtype) && tile.count == kTile && padded == table.width) {
    tile.items = static_cast<const T*>(items.data) + tile.first * items.stride;
    tile.stride = items.stride;
  } else {
    for (int v = 0; v < kTile; ++v) {
      T* row = copy + v * padded;
      const int64_t width = v < tile.count ? table.width : 0;
      if (width) convert(items, (tile.first + v) * items.stride, width, row);
      for (int64_t k = width; k < padded; ++k) row[k] = 0;
    }
    tile.items = copy;
    tile.stride = padded;
  }
  tile.in_chunks = false;
  tile.bias = nullptr;
  if (table.bias.data) {
    for (int v = 0; v < kTile; ++v) {
      bias[v] = 0;
      if (v < tile.count) convert(table.bias, (tile.first + v) * table.bias.stride, 1, bias + v);
    }
    tile.bias = bias;
  }
  return tile;
}

// The tile's items in chunks of columns.
template <class X>
void to_chunks(Tile<typename X::T>* tile, typename X::T* chunks) {
  using T = typename X::T;
  const int64_t padded = tile->padded;
  for (int64_t column = 0; column < padded; column += kChunk<T>) {
    const int64_t chunk = chunk_width<T>(padded, column);
    for (int v = 0; v < tile->count; ++v) {
      const T* in = tile->items + v * tile->stride + column;
      T* out = chunks + column * kTile + v * chunk;
      for (int64_t k = 0; k < chunk; k += X::L) X::store(out + k, X::load(in + k));
    }
  }
  tile->items = chunks;
  tile->in_chunks = true;
}

// The right side of a product: rows of `stride`, or, where that is 0, rows [first, ...) of a matrix
// of `rows` rows in chunks of columns.
template <typename T>
struct Right {
  const T* data;
  int64_t stride, rows, first;
};

template <typename T>
Right<T> items_on_right(const Tile<T>& tile) {
  return {tile.items, tile.in_chunks ? 0 : tile.stride, kTile, 0};
}

// ---- scores

// scores[v][row] for R items from v on and C vectors of rows. Every score is its bias plus the
// products in the order of k, whatever R and C are: an item's score does not depend on its place.
template <class X, int R, int C, bool kBias>
ALWAYS_INLINE void score_group(const Tile<typename X::T>& tile, int64_t v, int64_t width,
                               const typename X::T* rows, typename X::T* scores,
                               int64_t scores_stride) {
  using T = typename X::T;
  typename X::V acc[R][C];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = kBias ? X::set1(tile.bias[v + r]) : X::zero();
  }
  for (int64_t column = 0; column < width;) {
    int64_t stop = width, stride = tile.stride;
    const T* items = tile.items + v * stride;
    if (tile.in_chunks) {
      stride = chunk_width<T>(tile.padded, column);
      items = tile.items + column * kTile + v * stride;
      if (column + stride < width) stop = column + stride;
    }
    // A pointer to every fourth item and three distances: addresses for the load instruction
    // itself. With R pointers the compiler reloads them from the stack for every k.
    const T* at[(R + 3) / 4];
#pragma GCC unroll 8
    for (int q = 0; q < (R + 3) / 4; ++q) at[q] = items + 4 * q * stride;
    const int64_t stride3 = 3 * stride, depth = stop - column;
    for (int64_t k = 0; k < depth; ++k) {
      typename X::V b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) b[c] = X::load(rows + c * X::L);
      rows += C * X::L;
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        const int64_t apart = r % 4 == 3 ? stride3 : r % 4 * stride;
        const typename X::V a = X::set1(at[r / 4][apart + k]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = X::fma(a, b[c], acc[r][c]);
      }
    }
    column = stop;
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) X::store(scores + r * scores_stride + c * X::L, acc[r][c]);
  }
}

// R short rows at once are too many streams for the hardware's prefetcher: with 16 rows of hidden a
// pass over 118k items of width 64 took twice as long. Past the table's end it does no harm.
template <typename T>
ALWAYS_INLINE void prefetch_items(const Tile<T>& tile, int64_t v, int count) {
  for (int64_t r = v; r < v + count; ++r) {
    const uintptr_t row = tile.next + static_cast<uintptr_t>(r * tile.next_stride);
    for (int64_t i = 0; i < tile.next_width; i += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<uintptr_t>(i)), 0, 2);
    }
  }
}

template <class X, int R, int C>
void score_groups(const Tile<typename X::T>& tile, int64_t width, const typename X::T* rows,
                  typename X::T* scores, int64_t scores_stride, bool ahead) {
  for (int v = 0; v < tile.count; v += R) {
    if (ahead) prefetch_items(tile, v, R);
    typename X::T* out = scores + v * scores_stride;
    if (tile.bias) {
      score_group<X, R, C, true>(tile, v, width, rows, out, scores_stride);
    } else {
      score_group<X, R, C, false>(tile, v, width, rows, out, scores_stride);
    }
  }
}

// Where some items begin: every fourth, and three distances, as in score_group.
template <typename T, int kItems>
struct ItemStarts {
  const T* at[kItems / 4];
  int64_t stride, stride3;

  ALWAYS_INLINE const T* operator()(int item, int64_t k) const {
    return at[item / 4] + (item % 4 == 3 ? stride3 : item % 4 * stride) + k;
  }
};

// Prefetches the rows of the next tile, some lines of 64 bytes at a time, in the order in which
// they lie. 48 items at once took 1.8 of the time; a line of each of 16 items, then the next of
// each, up to 1.2 of it.
struct Ahead {
  uintptr_t at, row, stop;
  int64_t stride, width, lines;

  // In `steps` steps it gets through `items` rows.
  template <typename T>
  ALWAYS_INLINE Ahead(const Tile<T>& tile, int64_t items, int64_t steps)
      : at(tile.next),
        row(tile.next),
        stop(tile.next),
        stride(tile.next_stride),
        width(tile.next_width),
        lines(steps == 0 ? 0 : ((width + 63) / 64 * items + steps - 1) / steps) {
    // rows without gaps are one
    stop += static_cast<uintptr_t>(width == stride ? kTile * stride : width);
  }

  ALWAYS_INLINE void step() {
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
      at += 64;
      if (at >= stop) {
        row += static_cast<uintptr_t>(stride);
        at = row;
        stop = row + static_cast<uintptr_t>(width);
      }
    }
  }
};

// Scores of N rows, scores[r * row_apart + v * item_apart], with the bits of score_group: the bias
// plus the products in the order of k. Vectors hold a column of items, transposed on the way: at
// one row the pass waits for memory meanwhile. Items are read, and scores written, up to the next
// kItems.
template <class X, int N>
void score_few(const Tile<typename X::T>& tile, const PackedRows<typename X::T>& rows,
               typename X::T* scores, int64_t row_apart, int64_t item_apart) {
  using T = typename X::T;
  using V = typename X::V;
  // As many sums as fit into the registers; a few hide the latency of fma.
  constexpr int kMost = (X::kWide == 3 ? 16 : 8) * X::L / N;
  constexpr int kItems = kMost >= 16 ? 16 : kMost >= 8 ? 8 : 4;
  constexpr int G = kItems / X::L, K = X::kColumns;
  static_assert(kTile % kItems == 0 && K * sizeof(T) == 16);
  const int64_t width = rows.width;
  Ahead ahead(tile, kItems, (width + K - 1) / K);
  for (int v = 0; v < tile.count; v += kItems) {
    V acc[N][G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) {
        acc[r][g] = tile.bias ? X::load(tile.bias + v + g * X::L) : X::zero();
      }
    }
    for (int64_t column = 0; column < width; column += rows.chunk) {
      const int64_t apart = chunk_width(rows.chunk, rows.padded, column);
      const int64_t depth = width - column < apart ? width - column : apart;
      const T* in = rows.rows + column * N;
      ItemStarts<T, kItems> starts{{}, tile.stride, 3 * tile.stride};
#pragma GCC unroll 4
      for (int q = 0; q < kItems / 4; ++q) {
        starts.at[q] = tile.items + (v + 4 * q) * tile.stride + column;
      }
      int64_t k = 0;
      for (; k + K <= depth; k += K, in += K) {
        ahead.step();
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          V x[K];
          X::columns([&](int i) { return starts(g * X::L + i, k); }, x);
#pragma GCC unroll 4
          for (int j = 0; j < K; ++j) {
#pragma GCC unroll 8
            for (int r = 0; r < N; ++r) {
              acc[r][g] = X::fma(x[j], X::set1(in[r * apart + j]), acc[r][g]);
            }
          }
        }
      }
      if (k == depth) continue;
      ahead.step();
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        V x[K];
        X::columns([&](int i) { return starts(g * X::L + i, k); }, x);
        T kept[K * X::L];
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j) X::store(kept + j * X::L, x[j]);
        // Without the zeros that follow: -0 + 0 is 0.
        for (int64_t j = 0; j < depth - k; ++j) {
          const V one = X::load(kept + j * X::L);
#pragma GCC unroll 8
          for (int r = 0; r < N; ++r) {
            acc[r][g] = X::fma(one, X::set1(in[r * apart + j]), acc[r][g]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) {
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        T* out = scores + r * row_apart + (v + g * X::L) * item_apart;
        if (item_apart == 1) {
          X::store(out, acc[r][g]);
          continue;
        }
        T part[X::L];
        X::store(part, acc[r][g]);
        for (int i = 0; i < X::L; ++i) out[i * item_apart] = part[i];
      }
    }
  }
}

// At most N rows.
template <class X, int N = kFewRows<X::L>>
void score_few_rows(const Tile<typename X::T>& tile, const PackedRows<typename X::T>& rows,
                    typename X::T* scores, int64_t row_apart, int64_t item_apart) {
  if (rows.count == N) return score_few<X, N>(tile, rows, scores, row_apart, item_apart);
  if constexpr (N > 1) score_few_rows<X, N - 1>(tile, rows, scores, row_apart, item_apart);
}

template <class T>
int vectors_of_panel(int64_t rows, int64_t start, int lanes) {
  const int64_t left = rows - start;
  return left < kPanel<T> ? static_cast<int>((left + lanes - 1) / lanes) : kPanel<T> / lanes;
}

// scores[v][row] of a tile for the panel of rows that begins at `start`.
template <class X>
void score_panel(const Tile<typename X::T>& tile, const PackedRows<typename X::T>& rows,
                 int64_t start, int vectors, typename X::T* scores, int64_t scores_stride) {
  // Vectors of items: 4 rows in vectors of 4 take 0.8 of the time of vectors of rows, 8 in vectors
  // of 16 0.8, 7 in vectors of 8 1.2.
  constexpr int kFew = X::L > 8 ? X::L / 2 : 4;
  if (rows.count <= kFew) {
    for (int v = 0; v < tile.count; ++v) {  // lanes without a row
      for (int64_t r = 0; r < rows.count; r += X::L) {
        X::store(scores + v * scores_stride + r, X::zero());
      }
    }
    return score_few_rows<X, kFew>(tile, rows, scores, 1, scores_stride);
  }
  constexpr bool kLarge = X::kWide == 3;
  const typename X::T* panel = rows.panels + start * rows.width;
  bool ahead = start == 0;
  while (vectors > 0) {
    int used = 1;
    if (kLarge && vectors >= 3) {
      score_groups<X, kLarge ? 8 : 1, kLarge ? 3 : 1>(tile, rows.width, panel, scores,
                                                      scores_stride, ahead);
      used = 3;
    } else if (vectors >= 2) {
      score_groups<X, 6, 2>(tile, rows.width, panel, scores, scores_stride, ahead);
      used = 2;
    } else {
      score_groups<X, 6, 1>(tile, rows.width, panel, scores, scores_stride, ahead);
    }
    panel += used * X::L * rows.width;
    scores += used * X::L;
    vectors -= used;
    ahead = false;
  }
}

// ---- products of the backward pass

// out[r][column] += sum over k of a[r, k] b[k][column], R rows and C vectors of columns; or = where
// kAdd is false. The sum starts at 0 and not at `out`: sums of sums lose less than one long sum.
template <class X, int R, int C, bool kAdd>
ALWAYS_INLINE void add_product_group(int64_t depth, const typename X::T* a, int64_t a_row,
                                     int64_t a_k, const typename X::T* b, int64_t b_k,
                                     typename X::T* out, int64_t out_row) {
  typename X::V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      acc[r][c] = X::zero();
      if (kAdd) __builtin_prefetch(out + r * out_row + c * X::L, 1, 3);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename X::V row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = X::load(b + c * X::L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename X::V x = X::set1(a[r * a_row]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = X::fma(x, row[c], acc[r][c]);
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      typename X::T* p = out + r * out_row + c * X::L;
      X::store(p, kAdd ? X::add(X::load(p), acc[r][c]) : acc[r][c]);
    }
  }
}

template <class X, int C, int kARow, int kAK, bool kAdd>
void add_product_columns(int64_t rows, int64_t depth, const typename X::T* a, int64_t a_stride,
                         const typename X::T* b, int64_t b_k, typename X::T* out, int64_t out_row) {
  const int64_t a_row = kARow ? kARow : a_stride, a_k = kAK ? kAK : a_stride;
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    add_product_group<X, 6, C, kAdd>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                                     out_row);
  }
  if (r + 4 <= rows) {
    add_product_group<X, 4, C, kAdd>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                                     out_row);
    r += 4;
  }
  if (r + 2 <= rows) {
    add_product_group<X, 2, C, kAdd>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                                     out_row);
    r += 2;
  }
  if (r < rows) {
    add_product_group<X, 1, C, kAdd>(depth, a + r * a_row, a_row, a_k, b, b_k, out + r * out_row,
                                     out_row);
  }
}

// out[rows][columns] += A b, or = where kAdd is false; A's element (r, k) is
// a[r * kARow + k * kAK], 0 standing for a_stride.
template <class X, int kARow, int kAK, bool kAdd>
void add_product(int64_t rows, int64_t depth, int64_t columns, const typename X::T* a,
                 int64_t a_stride, const Right<typename X::T>& b, typename X::T* out,
                 int64_t out_row) {
  using T = typename X::T;
  constexpr int kMany = X::kWide == 3 ? 4 : 2;
  for (int64_t column = 0; column < columns; column += kChunk<T>) {
    const int64_t chunk = chunk_width<T>(columns, column);
    const int64_t stride = b.stride ? b.stride : chunk;
    const T* in = b.data + (b.stride ? column : column * b.rows + b.first * chunk);
    int64_t c = 0;
    for (; c + kMany * X::L <= chunk; c += kMany * X::L) {
      add_product_columns<X, kMany, kARow, kAK, kAdd>(rows, depth, a, a_stride, in + c, stride,
                                                      out + column + c, out_row);
    }
    for (; c < chunk; c += X::L) {
      add_product_columns<X, 1, kARow, kAK, kAdd>(rows, depth, a, a_stride, in + c, stride,
                                                  out + column + c, out_row);
    }
  }
}

}  // namespace
