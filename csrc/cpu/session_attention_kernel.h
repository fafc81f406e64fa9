// session_attention for one instruction set. Included after simd_<set>.h.
//
// A vector holds elements of one row. The scores of a query are dot products, reduced by one tree
// for as many as a vector has lanes; what else there is adds rows times numbers. So no row is
// packed or transposed, which for a session of six items would cost more than its products. A
// number's sum has an order of its own, whatever stands beside it.
#pragma once

#include "dropout_kernel.h"
#include "float_types.h"
#include "session_attention.h"

namespace {

using t4r_fast::Attention;
using t4r_fast::AttentionGradients;
using t4r_fast::AttentionKernels;
using t4r_fast::AttentionOutputs;
using t4r_fast::Heads;
using t4r_fast::kQueries;

// Dot products that share the row on the left.
template <class X>
constexpr int kUnit = X::L < 4 ? X::L : 4;

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* operator[](int64_t i) const { return data + i * stride; }
};

// Memory given away in whole cache lines.
class Arena {
 public:
  explicit Arena(char* at) : at_(at) {}
  template <typename E>
  E* take(int64_t count) {
    E* const found = reinterpret_cast<E*>(at_);
    at_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
    return found;
  }

 private:
  char* at_;
};

template <typename T>
constexpr Dtype kDtypeOf = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;

template <typename T>
ALWAYS_INLINE void load_row(const Matrix& from, int64_t offset, int64_t width, int64_t padded,
                            T* out) {
  convert(from, offset, width, out);
  for (int64_t d = width; d < padded; ++d) out[d] = 0;
}

template <typename T>
ALWAYS_INLINE void store_row(const T* from, int64_t width, Dtype dtype, int64_t offset, void* out) {
  if (dtype == kDtypeOf<T>) {
    T* const to = static_cast<T*>(out) + offset;
    for (int64_t d = 0; d < width; ++d) to[d] = from[d];
  } else {
    round_to_half(from, dtype, width, static_cast<uint16_t*>(out) + offset);
  }
}

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

inline void zero_row(int64_t width, Dtype dtype, int64_t offset, void* out) {
  const int64_t size = size_of(dtype);
  __builtin_memset(static_cast<char*>(out) + offset * size, 0, static_cast<size_t>(width * size));
}

// Rows [first, first + count) of a head: in place if they are whole vectors, or copied to `copy`.
// Rows are vectors of their own type: nothing is copied in or out.
template <class X>
ALWAYS_INLINE bool in_place(const Attention& a) {
  return a.width == a.padded && a.q.rows.dtype == kDtypeOf<typename X::T>;
}

// The entries of q of a block lie one behind the other.
inline bool side_by_side(const int64_t* query, int64_t count) {
  return query[count - 1] - query[0] == count - 1;  // those of a session ascend
}

inline void prefetch(const Heads& from, int64_t head, int64_t row, int64_t width) {
  const int64_t size = size_of(from.rows.dtype);
  const char* const data =
      static_cast<const char*>(from.rows.data) + (row * from.rows.stride + head * from.head) * size;
  for (int64_t at = 0; at < width * size; at += 64) __builtin_prefetch(data + at);
}

template <class X>
Rows<typename X::T> rows_of(const Heads& from, int64_t head, int64_t first, int64_t count,
                            int64_t width, int64_t padded, typename X::T* copy) {
  using T = typename X::T;
  const int64_t start = head * from.head + first * from.rows.stride;
  if (width == padded && from.rows.dtype == kDtypeOf<T>) {
    return {static_cast<const T*>(from.rows.data) + start, from.rows.stride};
  }
  for (int64_t i = 0; i < count; ++i) {
    load_row(from.rows, start + i * from.rows.stride, width, padded, copy + i * padded);
  }
  return {copy, padded};
}

// ---- products

// Up to L dot products, kUnit of them with one row on the left.
template <class X>
struct Unit {
  const typename X::T *a, *b;  // the row on the left, of x and of y
  const typename X::T *x[kUnit<X>], *y[kUnit<X>];
  typename X::T* out;
};

template <class X, bool kTwo, int kUnits>
void unit_dots(const Unit<X>* units, int64_t padded) {
  using V = typename X::V;
  constexpr int kEach = kUnit<X>;
  V sums[X::L];
#pragma GCC unroll 16
  for (int i = 0; i < X::L; ++i) sums[i] = X::zero();
  for (int64_t d = 0; d < padded; d += X::L) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const V a = X::load(units[u].a + d);
#pragma GCC unroll 4
      for (int i = 0; i < kEach; ++i) {
        sums[u * kEach + i] = X::fma(a, X::load(units[u].x[i] + d), sums[u * kEach + i]);
      }
      if (kTwo) {
        const V b = X::load(units[u].b + d);
#pragma GCC unroll 4
        for (int i = 0; i < kEach; ++i) {
          sums[u * kEach + i] = X::fma(b, X::load(units[u].y[i] + d), sums[u * kEach + i]);
        }
      }
    }
  }
  typename X::T found[X::L];
  X::store(found, X::sums(sums));
  for (int u = 0; u < kUnits; ++u) {
    __builtin_memcpy(units[u].out, found + u * kEach, kEach * sizeof *found);
  }
}

template <class X, bool kTwo>
void unit_dots(const Unit<X>* units, int count, int64_t padded) {
  switch (count) {
    case 1:
      return unit_dots<X, kTwo, 1>(units, padded);
    case 2:
      return unit_dots<X, kTwo, (X::L >= 8 ? 2 : 1)>(units, padded);
    case 3:
      return unit_dots<X, kTwo, (X::L >= 16 ? 3 : 1)>(units, padded);
    default:
      return unit_dots<X, kTwo, (X::L >= 16 ? 4 : 1)>(units, padded);
  }
}

// out[i * stride + j] = a[i] . x[j], and + b[i] . y[shift[i] + j] if kTwo, for j < sizes[i]. Writes
// up to the next multiple of kUnit.
template <class X, bool kTwo>
void dots(Rows<typename X::T> a, Rows<typename X::T> b, Rows<typename X::T> x,
          Rows<typename X::T> y, const int64_t* shift, const int64_t* sizes, int64_t count,
          int64_t padded, int64_t stride, typename X::T* out) {
  constexpr int kEach = kUnit<X>, kUnits = X::L / kEach;
  Unit<X> units[kUnits];
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < sizes[i]; j += kEach) {
      Unit<X>& unit = units[filled];
      unit.a = a[i];
      unit.out = out + i * stride + j;
      if (kTwo) unit.b = b[i];
      for (int u = 0; u < kEach; ++u) {
        const int64_t column = j + u < sizes[i] ? j + u : sizes[i] - 1;
        unit.x[u] = x[column];
        if (kTwo) unit.y[u] = y[shift[i] + column];
      }
      if (++filled == kUnits) {
        unit_dots<X, kTwo, kUnits>(units, padded);
        filled = 0;
      }
    }
  }
  if (filled) unit_dots<X, kTwo>(units, filled, padded);
}

// A block of a product: row r of `out`, r < kRows, is the sum over i < count of
// factors[r * row + i * step] times the row i of x[r], or of x[0] if they share it.
template <typename T>
struct Product {
  const T* factors;
  int64_t row, step;
  const T* x[4];
  int64_t x_stride, count;
  T* out;
  int64_t out_stride;
  bool add;  // to what is there
};

template <class X, int kRows, int kVectors, bool kShared>
ALWAYS_INLINE void product_block(const Product<typename X::T>& p, int64_t d) {
  using V = typename X::V;
  V sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) {
      sums[r][c] = p.add ? X::load(p.out + r * p.out_stride + d + c * X::L) : X::zero();
    }
  }
  for (int64_t i = 0; i < p.count; ++i) {
    V x[kVectors];
    if (kShared) {
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) x[c] = X::load(p.x[0] + i * p.x_stride + d + c * X::L);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V factor = X::set1(p.factors[r * p.row + i * p.step]);
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) {
        if (!kShared) x[c] = X::load(p.x[r] + i * p.x_stride + d + c * X::L);
        sums[r][c] = X::fma(factor, x[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) {
      X::store(p.out + r * p.out_stride + d + c * X::L, sums[r][c]);
    }
  }
}

template <class X, int kRows, bool kShared>
void product_rows(const Product<typename X::T>& p, int64_t padded) {
  constexpr int kMost = X::kWide;
  int64_t d = 0;
  for (; d + kMost * X::L <= padded; d += kMost * X::L) {
    product_block<X, kRows, kMost, kShared>(p, d);
  }
  const int64_t left = (padded - d) / X::L;
  if (left == 2) product_block<X, kRows, 2, kShared>(p, d);
  if (left == 1) product_block<X, kRows, 1, kShared>(p, d);
}

template <class X, bool kShared>
void product(const Product<typename X::T>& p, int64_t rows, int64_t padded) {
  switch (rows) {
    case 1:
      return product_rows<X, 1, kShared>(p, padded);
    case 2:
      return product_rows<X, 2, kShared>(p, padded);
    case 3:
      return product_rows<X, 3, kShared>(p, padded);
    default:
      return product_rows<X, 4, kShared>(p, padded);
  }
}

// out[i] = sum over j < sizes[i] of factors[i * stride + j] * x[j]. A query takes no product with
// an item that it does not see: 0 * nan is nan.
template <class X>
void weighted_rows(const typename X::T* factors, int64_t stride, Rows<typename X::T> x,
                   const int64_t* sizes, int64_t count, int64_t padded, typename X::T* out,
                   int64_t out_stride) {
  using T = typename X::T;
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t rows = count - i < 4 ? count - i : 4;
    int64_t common = sizes[i];
    for (int64_t r = 1; r < rows; ++r) common = sizes[i + r] < common ? sizes[i + r] : common;
    const T* const f = factors + i * stride;
    T* const to = out + i * out_stride;
    product<X, true>({f, stride, 1, {x.data}, x.stride, common, to, out_stride, false}, rows,
                     padded);
    for (int64_t r = 0; r < rows; ++r) {
      if (sizes[i + r] == common) continue;
      product<X, true>({f + r * stride + common,
                        stride,
                        1,
                        {x[common]},
                        x.stride,
                        sizes[i + r] - common,
                        to + r * out_stride,
                        out_stride,
                        true},
                       1, padded);
    }
  }
}

// The same with the rows of y from shift[i] on.
template <class X>
void weighted_shifted_rows(const typename X::T* factors, int64_t stride, Rows<typename X::T> y,
                           const int64_t* shift, const int64_t* sizes, int64_t count,
                           int64_t padded, typename X::T* out) {
  using T = typename X::T;
  for (int64_t i = 0; i < count;) {
    int64_t rows = 1;
    while (rows < 4 && i + rows < count && sizes[i + rows] == sizes[i]) ++rows;
    Product<T> p{factors + i * stride, stride, 1,    {}, y.stride, sizes[i],
                 out + i * padded,     padded, false};
    for (int64_t r = 0; r < rows; ++r) p.x[r] = y[shift[i + r]];
    product<X, false>(p, rows, padded);
    i += rows;
  }
}

// out[j] += sum over queries i of factors[i * stride + j] * x[i], j < size; in the order of
// queries.
template <class X>
void add_transposed(const typename X::T* factors, int64_t stride, Rows<typename X::T> x,
                    int64_t count, int64_t size, int64_t padded, bool add, typename X::T* out,
                    int64_t out_stride) {
  for (int64_t j = 0; j < size; j += 4) {
    product<X, true>(
        {factors + j, 1, stride, {x.data}, x.stride, count, out + j * out_stride, out_stride, add},
        size - j < 4 ? size - j : 4, padded);
  }
}

// out[shift[i] + j] += factors[i * stride + j] * x[i], in the order of queries.
template <class X>
void add_shifted(const typename X::T* factors, int64_t stride, Rows<typename X::T> x,
                 const int64_t* shift, const int64_t* sizes, int64_t count, int64_t padded,
                 typename X::T* out) {
  using V = typename X::V;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < padded; d += X::L) {
      const V row = X::load(x[i] + d);
      typename X::T* to = out + shift[i] * padded + d;
      for (int64_t j = 0; j < sizes[i]; ++j, to += padded) {
        X::store(to, X::fma(X::set1(factors[i * stride + j]), row, X::load(to)));
      }
    }
  }
}

// ---- dropout

// Factors of some rows at once: rows are short, and a vector takes the counters of several.
struct SquareDraws : Draws {
  using Draws::Draws;

  // Counters in the order of lanes that W32::select wants, for `blocks` times 4 columns a row.
  static void counters(const int64_t* place, int64_t count, int64_t blocks, uint64_t* number,
                       uint64_t* position) {
    int64_t lane[W32::L];
    for (int i = 0; i < W32::L; ++i) lane[W32::kCounter[i]] = i;
    int64_t c = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t block = 0; block < blocks; ++block, ++c) {
        const int64_t at = c / W32::L * W32::L + lane[c % W32::L];
        number[at] = static_cast<uint64_t>(block);
        position[at] = static_cast<uint64_t>(place[i]);
      }
    }
    for (; c % W32::L; ++c) {
      number[c / W32::L * W32::L + lane[c % W32::L]] = 0;
      position[c / W32::L * W32::L + lane[c % W32::L]] = 0;
    }
  }

  // out: 4 numbers for each of `all` counters and on to a whole vector of counters.
  template <class X>
  void square(const uint64_t* number, const uint64_t* position, int64_t all, uint32_t session,
              uint32_t of_head, typename X::T* out) const {
    const uint64_t of_session = uint64_t{kSecond} * session;
    const W32::V high = W32::set1(static_cast<uint32_t>(of_session >> 32));
    const W32::V low = W32::set1(static_cast<uint32_t>(of_session));
    const W32::V head = W32::set1(of_head);
    const typename X::V factor = X::set1(static_cast<typename X::T>(scale));
    for (int64_t c = 0; c < all; c += W32::L) {
      const W32::V of_block = W32::product(W32::load(number + c), W32::set1(kFirst));
      W32::V w[4] = {W32::exclusive_or(high, W32::load(position + c), keys[0][0]), low,
                     W32::exclusive_or(W32::high(of_block), head, keys[0][1]), of_block};
      rounds<1>(w);
      W32::select(w, least, factor, out + 4 * c);
    }
  }
};

// ---- one session of one head

// Some queries of a session and what they are given.
template <class X>
struct Block {
  using T = typename X::T;
  int64_t count, size, stride;  // queries, items, from query to query in a plane
  T *by_items, *by_places;      // queries with the biases added, scaled
  T *scores, *weights, *factors;
  int64_t *sizes, *shift;
  uint64_t *number, *position;

  Block(const Attention& a, Arena& arena)
      : by_items(arena.take<T>(kQueries * a.padded)),
        by_places(arena.take<T>(kQueries * a.padded)),
        scores(arena.take<T>(plane(a.longest))),
        weights(arena.take<T>(plane(a.longest))),
        factors(arena.take<T>(plane(a.longest))),
        sizes(arena.take<int64_t>(kQueries)),
        shift(arena.take<int64_t>(kQueries)),
        number(arena.take<uint64_t>(plane(a.longest) / 4)),
        position(arena.take<uint64_t>(plane(a.longest) / 4)) {}

  // A vector behind the last row, and the draws of a whole vector of counters.
  static int64_t plane(int64_t longest) { return kQueries * ((longest + 3) / 4 * 4) + 64; }

  void load(const Attention& a, int64_t head, int64_t first, int64_t n, int64_t items,
            const T* key_bias, const T* position_bias) {
    using V = typename X::V;
    count = n;
    size = items;
    stride = (items + 3) / 4 * 4;
    const V scale = X::set1(static_cast<T>(a.scale));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = a.place[first + i];
      sizes[i] = a.causal ? place + 1 : items;
      shift[i] = a.longest - 1 - place;
      T* const row = by_items + i * a.padded;
      const int64_t at = a.query[first + i] * a.q.rows.stride + head * a.q.head;
      const bool direct = in_place<X>(a);
      if (!direct) load_row(a.q.rows, at, a.width, a.padded, row);
      const T* const from = direct ? static_cast<const T*>(a.q.rows.data) + at : row;
      for (int64_t d = 0; d < a.padded; d += X::L) {
        const V q = X::load(from + d);
        if (key_bias == nullptr) {
          X::store(row + d, X::mul(q, scale));
        } else {
          X::store(row + d, X::mul(X::add(q, X::load(key_bias + d)), scale));
          X::store(by_places + i * a.padded + d,
                   X::mul(X::add(q, X::load(position_bias + d)), scale));
        }
      }
    }
  }

  void score(const Attention& a, Rows<T> k, Rows<T> keys) {
    const Rows<T> left{by_items, a.padded}, second{by_places, a.padded};
    if (keys.data == nullptr) {
      dots<X, false>(left, second, k, keys, shift, sizes, count, a.padded, stride, scores);
    } else {
      dots<X, true>(left, second, k, keys, shift, sizes, count, a.padded, stride, scores);
    }
  }

  void draw(const Attention& a, const SquareDraws& draws, int64_t session, int64_t head,
            int64_t first) {
    SquareDraws::counters(a.place + first, count, stride / 4, number, position);
    draws.template square<X>(number, position, count * stride / 4, static_cast<uint32_t>(session),
                             static_cast<uint32_t>(head), factors);
  }

  // Lanes of a vector at column j that a query sees.
  static ALWAYS_INLINE typename X::M seen(int64_t size, int64_t j) {
    alignas(64) static constexpr T kLane[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                8, 9, 10, 11, 12, 13, 14, 15};
    return X::greater(X::set1(static_cast<T>(size - j)), X::load(kLane));
  }

  // weights = exp(scores - shift) / their sum, 0 where nothing is seen; shift is the largest score,
  // or as given. Rows go in order, since a row's last vector reaches into the next row.
  T softmax_row(int64_t i, const T* given) {
    using V = typename X::V;
    const T* const s = scores + i * stride;
    T* const p = weights + i * stride;
    const V least = X::set1(-__builtin_inff());
    V top = least;
    if (given == nullptr) {
      for (int64_t j = 0; j < sizes[i]; j += X::L) {
        top = X::max(X::select(seen(sizes[i], j), X::load(s + j), least), top);
      }
    }
    const T most = given == nullptr ? X::largest(top) : *given;
    V total = X::zero();
    for (int64_t j = 0; j < stride; j += X::L) {
      const V e = X::exp(X::sub(X::load(s + j), X::set1(most)));
      const V kept = X::select(seen(sizes[i], j), e, X::zero());
      total = X::add(total, kept);
      X::store(p + j, kept);
    }
    const T sum = X::sum(total);
    const V inverse = X::set1(1 / sum);
    for (int64_t j = 0; j < stride; j += X::L) X::store(p + j, X::mul(X::load(p + j), inverse));
    return most + (sizeof(T) == 4 ? static_cast<T>(__builtin_logf(static_cast<float>(sum)))
                                  : static_cast<T>(__builtin_log(static_cast<double>(sum))));
  }

  void apply_factors(T* values) const {
    for (int64_t f = 0; f < count * stride; f += X::L) {
      X::store(values + f, X::mul(X::load(values + f), X::load(factors + f)));
    }
  }
};

// What the sessions of a head share.
template <class X>
struct Head {
  using T = typename X::T;
  Rows<T> keys{nullptr, 0};
  const T *key_bias = nullptr, *position_bias = nullptr;

  Head(const Attention& a, int64_t head, Arena& arena) {
    if (a.keys.rows.data == nullptr) return;
    T* const biases = arena.take<T>(2 * a.padded);
    load_row(a.key_bias, head * a.key_bias.stride, a.width, a.padded, biases);
    load_row(a.position_bias, head * a.position_bias.stride, a.width, a.padded, biases + a.padded);
    key_bias = biases;
    position_bias = biases + a.padded;
    const int64_t rows = 2 * a.longest - 1;
    keys = rows_of<X>(a.keys, head, a.reach - a.longest + 1, rows, a.width, a.padded,
                      arena.take<T>(rows * a.padded));
  }
};

// The rows of a session and of its first queries, on their way while the one before is computed:
// three lines here and three there, which no hardware foresees.
inline void prefetch_session(const Attention& a, int64_t b, int64_t head, const Heads* dout) {
  const int64_t start = a.offsets[b], size = a.offsets[b + 1] - start;
  const int64_t first = a.first[b], queries = a.first[b + 1] - first;
  if (queries == 0) return;
  for (int64_t j = 0; j < (size < kQueries ? size : kQueries); ++j) {
    prefetch(a.k, head, start + j, a.width);
    prefetch(a.v, head, start + j, a.width);
  }
  for (int64_t i = 0; i < (queries < kQueries ? queries : kQueries); ++i) {
    prefetch(a.q, head, a.query[first + i], a.width);
    if (dout != nullptr) prefetch(*dout, head, a.query[first + i], a.width);
  }
}

template <class X>
void attention_forward(const Attention& a, int64_t b, int64_t stop, int64_t head,
                       const AttentionOutputs<typename X::T>& to, char* scratch) {
  using T = typename X::T;
  Arena arena(scratch);
  const Head<X> shared(a, head, arena);
  T* const k_copy = arena.take<T>(a.longest * a.padded);
  T* const v_copy = arena.take<T>(a.longest * a.padded);
  T* const out = arena.take<T>(kQueries * a.padded);
  Block<X> block(a, arena);
  const SquareDraws draws(a.dropout);
  for (; b < stop; ++b) {
    const int64_t start = a.offsets[b], size = a.offsets[b + 1] - start;
    if (b + 1 < stop) prefetch_session(a, b + 1, head, nullptr);
    if (a.first[b] == a.first[b + 1]) continue;
    const Rows<T> k = rows_of<X>(a.k, head, start, size, a.width, a.padded, k_copy);
    const Rows<T> v = rows_of<X>(a.v, head, start, size, a.width, a.padded, v_copy);
    for (int64_t first = a.first[b]; first < a.first[b + 1]; first += kQueries) {
      const int64_t left = a.first[b + 1] - first;
      block.load(a, head, first, left < kQueries ? left : kQueries, size, shared.key_bias,
                 shared.position_bias);
      block.score(a, k, shared.keys);
      const int64_t* const query = a.query + first;
      for (int64_t i = 0; i < block.count; ++i) {
        to.lse[query[i] * a.heads + head] = block.softmax_row(i, nullptr);
      }
      if (a.dropout.draws) {
        block.draw(a, draws, b, head, first);
        block.apply_factors(block.weights);
      }
      const bool direct = in_place<X>(a) && side_by_side(query, block.count);
      weighted_rows<X>(
          block.weights, block.stride, v, block.sizes, block.count, a.padded,
          direct ? static_cast<T*>(to.out) + (query[0] * a.heads + head) * a.width : out,
          direct ? a.heads * a.width : a.padded);
      for (int64_t i = 0; i < block.count && !direct; ++i) {
        store_row(out + i * a.padded, a.width, a.q.rows.dtype,
                  (a.query[first + i] * a.heads + head) * a.width, to.out);
      }
    }
  }
}

// The gradients of scores, in the place of those of dropped weights: p * (dp - sum of p * dp).
// With what the query sees alone, that is 0 for the only item of a session.
template <class X>
void score_gradients(const Block<X>& block, typename X::T* dp) {
  using V = typename X::V;
  for (int64_t i = 0; i < block.count; ++i) {
    const typename X::T* const p = block.weights + i * block.stride;
    typename X::T* const d = dp + i * block.stride;
    V total = X::zero();
    for (int64_t j = 0; j < block.sizes[i]; j += X::L) {
      const V product = X::mul(X::load(p + j), X::load(d + j));
      total = X::add(total, X::select(block.seen(block.sizes[i], j), product, X::zero()));
    }
    const V mean = X::set1(X::sum(total));
    for (int64_t j = 0; j < block.stride; j += X::L) {
      const typename X::M inside = block.seen(block.stride, j);
      const V found = X::mul(X::load(p + j), X::sub(X::load(d + j), mean));
      // what is not seen has weight 0, but dp may hold anything there
      const V kept = X::select(block.seen(block.sizes[i], j), found, X::zero());
      X::store(d + j, X::select(inside, kept, X::load(d + j)));
    }
  }
}

template <class X>
void attention_backward(const Attention& a, int64_t b, int64_t stop, int64_t head,
                        const AttentionGradients<typename X::T>& g, char* scratch) {
  using T = typename X::T;
  using V = typename X::V;
  Arena arena(scratch);
  const Head<X> shared(a, head, arena);
  T* const k_copy = arena.take<T>(a.longest * a.padded);
  T* const v_copy = arena.take<T>(a.longest * a.padded);
  T* const dk_copy = arena.take<T>(a.longest * a.padded);
  T* const dv_copy = arena.take<T>(a.longest * a.padded);
  T* const dout = arena.take<T>(kQueries * a.padded);
  T* const of_items = arena.take<T>(kQueries * a.padded);
  T* const of_places = arena.take<T>(kQueries * a.padded);
  Block<X> block(a, arena);
  T* const dp = arena.take<T>(Block<X>::plane(a.longest));
  const SquareDraws draws(a.dropout);
  const bool relative = shared.keys.data != nullptr;
  T* const dkey_bias = g.sums + (2 * a.longest - 1) * a.padded;
  T* const dposition_bias = dkey_bias + a.padded;
  const Dtype dtype = a.q.rows.dtype;
  const V scale = X::set1(static_cast<T>(a.scale));
  const bool direct = in_place<X>(a);
  const int64_t row_stride = a.heads * a.width, out_stride = direct ? row_stride : a.padded;
  for (; b < stop; ++b) {
    const int64_t start = a.offsets[b], size = a.offsets[b + 1] - start;
    if (b + 1 < stop) prefetch_session(a, b + 1, head, &g.dout);
    if (a.first[b] == a.first[b + 1]) {
      for (int64_t j = start; j < start + size; ++j) {
        zero_row(a.width, dtype, (j * a.heads + head) * a.width, g.dk);
        zero_row(a.width, dtype, (j * a.heads + head) * a.width, g.dv);
      }
      continue;
    }
    const Rows<T> k = rows_of<X>(a.k, head, start, size, a.width, a.padded, k_copy);
    const Rows<T> v = rows_of<X>(a.v, head, start, size, a.width, a.padded, v_copy);
    const int64_t at = start * row_stride + head * a.width;
    T* const dk = direct ? static_cast<T*>(g.dk) + at : dk_copy;
    T* const dv = direct ? static_cast<T*>(g.dv) + at : dv_copy;
    for (int64_t first = a.first[b]; first < a.first[b + 1]; first += kQueries) {
      const int64_t left = a.first[b + 1] - first;
      const bool later = first > a.first[b];
      const int64_t* const query = a.query + first;
      block.load(a, head, first, left < kQueries ? left : kQueries, size, shared.key_bias,
                 shared.position_bias);
      block.score(a, k, shared.keys);
      for (int64_t i = 0; i < block.count; ++i) {
        block.softmax_row(i, g.lse + query[i] * a.heads + head);
      }
      Rows<T> given{dout, a.padded};
      if (side_by_side(query, block.count)) {
        given = rows_of<X>(g.dout, head, query[0], block.count, a.width, a.padded, dout);
      } else {
        for (int64_t i = 0; i < block.count; ++i) {
          load_row(g.dout.rows, query[i] * g.dout.rows.stride + head * g.dout.head, a.width,
                   a.padded, dout + i * a.padded);
        }
      }
      dots<X, false>(given, given, v, v, block.shift, block.sizes, block.count, a.padded,
                     block.stride, dp);
      if (a.dropout.draws) {
        block.draw(a, draws, b, head, first);
        block.apply_factors(dp);
      }
      score_gradients(block, dp);
      if (a.dropout.draws) block.apply_factors(block.weights);
      const int64_t stride = block.stride, count = block.count;
      add_transposed<X>(block.weights, stride, given, count, size, a.padded, later, dv, out_stride);
      add_transposed<X>(dp, stride, {block.by_items, a.padded}, count, size, a.padded, later, dk,
                        out_stride);
      weighted_rows<X>(dp, stride, k, block.sizes, count, a.padded, of_items, a.padded);
      if (relative) {
        weighted_shifted_rows<X>(dp, stride, shared.keys, block.shift, block.sizes, count, a.padded,
                                 of_places);
        add_shifted<X>(dp, stride, {block.by_places, a.padded}, block.shift, block.sizes, count,
                       a.padded, g.sums);
      }
      for (int64_t d = 0; d < a.padded; d += X::L) {
        V items = X::zero(), places = X::zero();
        for (int64_t i = 0; i < count; ++i) {
          T* const row = of_items + i * a.padded + d;
          V sum = X::mul(X::load(row), scale);
          if (relative) {
            const V of_place = X::mul(X::load(of_places + i * a.padded + d), scale);
            items = X::add(items, sum);
            places = X::add(places, of_place);
            sum = X::add(sum, of_place);
          }
          X::store(
              direct ? static_cast<T*>(g.dq) + query[i] * row_stride + head * a.width + d : row,
              sum);
        }
        if (relative) {
          X::store(dkey_bias + d, X::add(X::load(dkey_bias + d), items));
          X::store(dposition_bias + d, X::add(X::load(dposition_bias + d), places));
        }
      }
      for (int64_t i = 0; i < count && !direct; ++i) {
        store_row(of_items + i * a.padded, a.width, dtype, query[i] * row_stride + head * a.width,
                  g.dq);
      }
    }
    for (int64_t j = 0; j < size && !direct; ++j) {
      store_row(dk + j * a.padded, a.width, dtype, at + j * row_stride, g.dk);
      store_row(dv + j * a.padded, a.width, dtype, at + j * row_stride, g.dv);
    }
  }
}

template <class X>
constexpr AttentionKernels<typename X::T> attention_kernels() {
  return {X::L, attention_forward<X>, attention_backward<X>};
}

}  // namespace
