// tied_table_step for one instruction set: the gradient of a tile of items in the cache, its
// update, and the steps that untouched rows missed. Included after simd_<set>.h.
#pragma once

#include "tied_softmax_loss_kernel.h"
#include "tied_table_step.h"

namespace {

using t4r_fast::MissedSteps;
using t4r_fast::TableGradient;
using t4r_fast::TableRule;

// Steps between two looks at whether an untouched row still moves, and the share of an eps of its
// largest value below which all further movement together is lost in rounding.
constexpr int kCheckEvery = 8;
constexpr double kNegligible = 1.0 / 64;

// ---- the gradient of a tile

inline int64_t first_lookup(const int64_t* ids, int64_t count, int64_t id) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (ids[low + half] < id) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

template <class X>
void add_softmax(const LossBackward<typename X::T>& a, int64_t index, int64_t padded,
                 const Target*& target, typename X::T* copy, typename X::T* bias, typename X::T* dz,
                 typename X::T* gradient) {
  using T = typename X::T;
  const Tile<T> tile = load_tile(a.table, index, padded, copy, bias);
  const int64_t step = padded > 2 * kChunk<T> ? kBlock<T> / 2 : kBlock<T>;
  for (int64_t block = 0; block < a.rows.count; block += step) {
    const int64_t left = a.rows.count - block;
    const int64_t block_rows = left < step ? left : step;
    for (int64_t start = block; start < block + block_rows; start += kPanel<T>) {
      gradient_panel<X>(a, tile, start, target, dz + (start - block), kBlockStride<T>);
    }
    const Right<T> rows{a.rows.rows, 0, a.rows.count, block};
    add_product<X, kBlockStride<T>, 1, true>(tile.count, block_rows, padded, dz, 0, rows, gradient,
                                             padded);
  }
}

// Walks over tiles in order; one per thread.
template <class X>
struct GradientWalk {
  using T = typename X::T;
  // Losses at once whose place among the targets is kept; more are searched for at each tile.
  static constexpr int kKept = 8;

  GradientWalk(const TableGradient<T>& g, int64_t index, T* scratch)
      : g(g),
        copy(scratch),
        gradient(copy + kTile * g.padded),
        dz(gradient + kTile * g.padded),
        bias(dz + kTile * kBlockStride<T>),
        lookup(g.ids ? first_lookup(g.ids, g.lookups, index * kTile) : 0) {
    for (int64_t i = 0; i < g.softmax_count && i < kKept; ++i) {
      target[i] = find_targets(g.softmax[i].targets, g.softmax[i].rows.count, index);
    }
  }

  // The gradient of a tile, (count, padded), zeros past the width; returns count.
  int64_t make(int64_t index) {
    const int64_t first = index * kTile, width = g.table.width;
    const int64_t left = g.table.count - first;
    const int64_t count = left < kTile ? left : kTile;
    __builtin_memset(gradient, 0, sizeof(T) * static_cast<uint64_t>(count * g.padded));
    for (int64_t i = 0; i < g.softmax_count; ++i) {
      const LossBackward<T>& a = g.softmax[i];
      if (i >= kKept) target[kKept] = find_targets(a.targets, a.rows.count, index);
      add_softmax<X>(a, index, g.padded, target[i < kKept ? i : kKept], copy, bias, dz, gradient);
    }
    for (; lookup < g.lookups && g.ids[lookup] < first + count; ++lookup) {
      T* out = gradient + (g.ids[lookup] - first) * g.padded;
      const T* row = g.rows + lookup * width;
      for (int64_t k = 0; k < width; ++k) out[k] += row[k];
    }
    if (g.formed.data) {
      for (int64_t v = 0; v < count; ++v) {
        T* out = gradient + v * g.padded;
        convert(g.formed, (first + v) * g.formed.stride, width, copy);
        for (int64_t k = 0; k < width; ++k) out[k] += copy[k];
      }
    }
    return count;
  }

  const TableGradient<T>& g;
  T *copy, *gradient, *dz, *bias;
  int64_t lookup;
  const Target* target[kKept + 1];
};

// ---- the update of a row

// One step's numbers, the same for all rows.
template <class X>
struct Numbers {
  using T = typename X::T;
  using V = typename X::V;

  Numbers(const TableRule<T>& r, double lr, double beta1_power, double beta2_power)
      : decay(X::set1(static_cast<T>(1 - lr * r.weight_decay))),
        step_size(X::set1(static_cast<T>(-lr / (1 - beta1_power)))),
        inverse_correction(X::set1(static_cast<T>(1 / __builtin_sqrt(1 - beta2_power)))),
        minus_lr(X::set1(static_cast<T>(-lr))) {}

  V decay, step_size, inverse_correction, minus_lr;
};

template <class X>
struct Fixed {
  using T = typename X::T;
  using V = typename X::V;

  explicit Fixed(const TableRule<T>& r)
      : scale(X::set1(static_cast<T>(r.scale))),
        beta2(X::set1(static_cast<T>(r.beta2))),
        rest1(X::set1(static_cast<T>(1 - r.beta1))),
        rest2(X::set1(static_cast<T>(1 - r.beta2))),
        eps(X::set1(static_cast<T>(r.eps))),
        weight_decay(X::set1(static_cast<T>(r.weight_decay))),
        momentum(X::set1(static_cast<T>(r.momentum))) {}

  V scale, beta2, rest1, rest2, eps, weight_decay, momentum;
};

// One vector of a row. `row` is the root of a row-wise second moment or sum, corrected, with eps.
template <class X, int kKind>
ALWAYS_INLINE void update_vector(const Fixed<X>& f, const Numbers<X>& n, bool has_first,
                                 typename X::V row, typename X::V g, typename X::V& w,
                                 typename X::V& first, typename X::V& second) {
  using V = typename X::V;
  if (kKind == t4r_fast::kAdamw || kKind == t4r_fast::kRowwiseAdamw) {
    w = X::mul(w, n.decay);
    first = X::fma(X::sub(g, first), f.rest1, first);
    V spread = row;
    if (kKind == t4r_fast::kAdamw) {
      second = X::fma(X::mul(g, g), f.rest2, X::mul(second, f.beta2));
      spread = X::fma(X::sqrt(second), n.inverse_correction, f.eps);
    }
    w = X::fma(X::div(first, spread), n.step_size, w);
    return;
  }
  g = X::fma(w, f.weight_decay, g);
  if (kKind == t4r_fast::kSgd) {
    if (has_first) first = g = X::fma(first, f.momentum, g);
    w = X::fma(g, n.minus_lr, w);
    return;
  }
  V spread = row;
  if (kKind == t4r_fast::kAdagrad) {
    first = X::fma(g, g, first);
    spread = X::add(X::sqrt(first), f.eps);
  }
  w = X::fma(X::div(g, spread), n.minus_lr, w);
}

template <typename T>
inline T root(T x) {
  return sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(x)))
                        : static_cast<T>(__builtin_sqrt(static_cast<double>(x)));
}

// The mean of squares of a row's gradient, with weight decay where the rule adds it; g and w are
// whole vectors with zeros past the width.
template <class X, int kKind>
typename X::T mean_square(const Fixed<X>& f, int64_t width, int64_t padded, const typename X::T* g,
                          const typename X::T* w) {
  typename X::V sum = X::zero();
  for (int64_t k = 0; k < padded; k += X::L) {
    typename X::V x = X::mul(X::load(g + k), f.scale);
    if (kKind == t4r_fast::kRowwiseAdagrad) x = X::fma(X::load(w + k), f.weight_decay, x);
    sum = X::fma(x, x, sum);
  }
  return X::sum(sum) / static_cast<typename X::T>(width);
}

// The spread of a row-wise rule after its second moment or sum took in this row.
template <class X, int kKind>
typename X::V row_spread(const TableRule<typename X::T>& r, const Fixed<X>& f, const Numbers<X>& n,
                         int64_t width, int64_t padded, const typename X::T* g,
                         const typename X::T* w, typename X::T* moment) {
  using T = typename X::T;
  if (kKind == t4r_fast::kRowwiseAdamw) {
    const T square = mean_square<X, kKind>(f, width, padded, g, w);
    *moment = *moment * static_cast<T>(r.beta2) + square * static_cast<T>(1 - r.beta2);
    return X::fma(X::set1(root(*moment)), n.inverse_correction, f.eps);
  }
  if (kKind == t4r_fast::kRowwiseAdagrad) {
    *moment += mean_square<X, kKind>(f, width, padded, g, w);
    return X::add(X::set1(root(*moment)), f.eps);
  }
  return X::zero();
}

constexpr bool has_row_moment(int kind) {
  return kind == t4r_fast::kRowwiseAdagrad || kind == t4r_fast::kRowwiseAdamw;
}

template <class X>
void load_row(const Matrix& items, int64_t row, int64_t width, int64_t padded, typename X::T* out) {
  convert(items, row * width, width, out);
  for (int64_t k = width; k < padded; ++k) out[k] = 0;
}

template <class X>
void store_row(const typename X::T* from, Dtype dtype, int64_t row, int64_t width, void* items) {
  using T = typename X::T;
  if (is_type<T>(dtype)) {
    T* out = static_cast<T*>(items) + row * width;
    for (int64_t k = 0; k < width; ++k) out[k] = from[k];
    return;
  }
  round_to_half(from, dtype, width, static_cast<uint16_t*>(items) + row * width);
}

// A table that can be worked on where it lies: rows are whole vectors of the kernels' type.
template <class X>
bool in_place(const ItemTable& table) {
  return is_type<typename X::T>(table.items.dtype) && table.width % X::L == 0;
}

// Steps one row; g (padded) is its gradient, buffers (3 * padded) hold the row where it cannot be
// worked on in place.
template <class X, int kKind>
void update_row(const ItemTable& table, const TableRule<typename X::T>& r, const Fixed<X>& f,
                const Numbers<X>& n, int64_t row, int64_t padded, const typename X::T* g,
                typename X::T* buffers) {
  using T = typename X::T;
  using V = typename X::V;
  const int64_t width = table.width;
  constexpr bool kFirstByRow = kKind == t4r_fast::kRowwiseAdagrad;
  constexpr bool kSecond = kKind == t4r_fast::kAdamw;
  const bool has_first = r.first && !kFirstByRow, whole = in_place<X>(table);
  T* w = static_cast<T*>(r.items) + row * width;
  T* first = has_first ? r.first + row * width : nullptr;
  T* second = kSecond ? r.second + row * width : nullptr;
  if (!whole) {
    w = buffers;
    load_row<X>(table.items, row, width, padded, w);
    if (first) {
      for (int64_t k = 0; k < padded; ++k) w[padded + k] = k < width ? first[k] : 0;
      first = w + padded;
    }
    if (second) {
      for (int64_t k = 0; k < padded; ++k) w[2 * padded + k] = k < width ? second[k] : 0;
      second = w + 2 * padded;
    }
  }
  T* const moments = kFirstByRow ? r.first : r.second;
  T* const moment = has_row_moment(kKind) ? moments + row : nullptr;
  const V spread = has_row_moment(kKind)
                       ? row_spread<X, kKind>(r, f, n, width, padded, g, w, moment)
                       : X::zero();
  for (int64_t k = 0; k < padded; k += X::L) {
    V x = X::load(w + k), a = first ? X::load(first + k) : X::zero();
    V b = kSecond ? X::load(second + k) : X::zero();
    update_vector<X, kKind>(f, n, has_first, spread, X::mul(X::load(g + k), f.scale), x, a, b);
    X::store(w + k, x);
    if (first) X::store(first + k, a);
    if (kSecond) X::store(second + k, b);
  }
  if (!whole) {
    store_row<X>(w, table.items.dtype, row, width, r.items);
    for (int64_t k = 0; first && k < width; ++k) r.first[row * width + k] = first[k];
    for (int64_t k = 0; second && k < width; ++k) r.second[row * width + k] = second[k];
  }
}

// Steps `count` numbers that lie side by side, whole vectors, of a rule without row-wise moments.
// Numbers are passed by value: behind a reference the compiler loads them again after every store.
template <class X, int kKind, bool kFirst>
void update_flat(const Fixed<X> f, const Numbers<X> n, int64_t count, const typename X::T* g,
                 typename X::T* w, typename X::T* first, typename X::T* second) {
  using V = typename X::V;
  constexpr bool kSecond = kKind == t4r_fast::kAdamw;
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; k += X::L) {
    V x = X::load(w + k), a = kFirst ? X::load(first + k) : X::zero();
    V b = kSecond ? X::load(second + k) : X::zero();
    update_vector<X, kKind>(f, n, kFirst, X::zero(), X::mul(X::load(g + k), f.scale), x, a, b);
    X::store(w + k, x);
    if (kFirst) X::store(first + k, a);
    if (kSecond) X::store(second + k, b);
  }
}

inline double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

template <class X>
Numbers<X> numbers(const TableRule<typename X::T>& r) {
  return {r, r.lr, power(r.beta1, r.step), power(r.beta2, r.step)};
}

// The states of a tile come in while its gradient is made.
template <typename T>
void prefetch_rows(const T* rows, int64_t first, int64_t count, int64_t width) {
  if (rows == nullptr) return;
  const char* p = reinterpret_cast<const char*>(rows + first * width);
  const int64_t bytes = count * width * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 1, 2);
}

template <class X, int kKind>
void step_tiles(const TableGradient<typename X::T>& g, const TableRule<typename X::T>& r,
                int64_t index, int64_t stop, typename X::T* scratch) {
  using T = typename X::T;
  GradientWalk<X> walk(g, index, scratch);
  T* const buffers = walk.bias + 2 * kTile;
  const Fixed<X> f(r);
  const Numbers<X> n = numbers<X>(r);
  const bool flat = in_place<X>(g.table) && !has_row_moment(kKind);
  for (; index < stop; ++index) {
    const int64_t first = index * kTile, left = g.table.count - first;
    const int64_t ahead = left < kTile ? left : kTile;
    if (kKind != t4r_fast::kRowwiseAdagrad) prefetch_rows(r.first, first, ahead, g.table.width);
    if (kKind == t4r_fast::kAdamw) prefetch_rows(r.second, first, ahead, g.table.width);
    const int64_t count = walk.make(index);
    if (flat) {
      const int64_t at = first * g.table.width, numbers_of_tile = count * g.table.width;
      T* const w = static_cast<T*>(r.items) + at;
      T* const second = r.second ? r.second + at : nullptr;
      if (r.first) {
        update_flat<X, kKind, true>(f, n, numbers_of_tile, walk.gradient, w, r.first + at, second);
      } else {
        update_flat<X, kKind, false>(f, n, numbers_of_tile, walk.gradient, w, nullptr, second);
      }
      continue;
    }
    for (int64_t v = 0; v < count; ++v) {
      update_row<X, kKind>(g.table, r, f, n, first + v, g.padded, walk.gradient + v * g.padded,
                           buffers);
    }
  }
}

template <class X>
void table_norm(const TableGradient<typename X::T>& g, double* squares, int64_t index, int64_t stop,
                typename X::T* scratch) {
  using T = typename X::T;
  GradientWalk<X> walk(g, index, scratch);
  for (; index < stop; ++index) {
    const int64_t count = walk.make(index);
    double total = 0;
    for (int64_t v = 0; v < count; ++v) {
      const T* row = walk.gradient + v * g.padded;
      typename X::V sum = X::zero();
      for (int64_t k = 0; k < g.padded; k += X::L) {
        sum = X::fma(X::load(row + k), X::load(row + k), sum);
      }
      total += static_cast<double>(X::sum(sum));
    }
    squares[index] = total;
  }
}

// ---- touched rows

template <class X, int kKind>
void step_rows(const TableGradient<typename X::T>& g, const TableRule<typename X::T>& r, int64_t at,
               int64_t stop, typename X::T* scratch) {
  using T = typename X::T;
  const Fixed<X> f(r);
  const Numbers<X> n = numbers<X>(r);
  T* const gradient = scratch;
  T* const buffers = scratch + g.padded;
  while (at < stop) {
    const int64_t id = g.ids[at];
    for (int64_t k = 0; k < g.padded; ++k) gradient[k] = 0;
    for (; at < stop && g.ids[at] == id; ++at) {
      const T* row = g.rows + at * g.table.width;
      for (int64_t k = 0; k < g.table.width; ++k) gradient[k] += row[k];
    }
    update_row<X, kKind>(g.table, r, f, n, id, g.padded, gradient, buffers);
  }
}

// ---- missed steps

// Whether Adam's moments may still move the row by more than rounding, all missed steps together:
// their quotient shrinks at least by `ratio` at each step.
template <class X, int kKind>
bool still_moves(const TableRule<typename X::T>& r, int64_t padded, double ratio, double highest_lr,
                 double beta1_power, const typename X::T* w, const typename X::T* first,
                 const typename X::T* second, typename X::T moment) {
  using T = typename X::T;
  using V = typename X::V;
  if (!(ratio < 1)) return true;
  V quotient = X::zero(), largest = X::zero();
  const V eps = X::set1(static_cast<T>(r.eps)), by_row = X::add(X::set1(root(moment)), eps);
  bool nan = false;
  for (int64_t k = 0; k < padded; k += X::L) {
    const V m = X::load(first + k), x = X::load(w + k);
    const V size = X::max(X::sub(X::zero(), m), m);
    const V spread = kKind == t4r_fast::kAdamw ? X::add(X::sqrt(X::load(second + k)), eps) : by_row;
    // 0 / 0 past the width, and where nothing was ever added with eps = 0
    const V part = X::select(X::equal(size, X::zero()), X::zero(), X::div(size, spread));
    nan = nan || X::bits(X::equal(part, part)) != X::bits(X::equal(X::zero(), X::zero()));
    quotient = X::max(part, quotient);
    largest = X::max(X::max(X::sub(X::zero(), x), x), largest);
  }
  T parts[2][X::L];
  X::store(parts[0], quotient);
  X::store(parts[1], largest);
  double most = 0, size = 0;
  for (int i = 0; i < X::L; ++i) {
    most = static_cast<double>(parts[0][i]) > most ? static_cast<double>(parts[0][i]) : most;
    size = static_cast<double>(parts[1][i]) > size ? static_cast<double>(parts[1][i]) : size;
  }
  if (most == 0 && !nan) return false;
  const double reach = most * highest_lr * ratio / ((1 - ratio) * (1 - beta1_power * r.beta1));
  const double eps_of_type =
      sizeof(T) == 4 ? static_cast<double>(__FLT_EPSILON__) : __DBL_EPSILON__;
  return nan || !(reach <= kNegligible * eps_of_type * size);
}

template <class X>
struct MissedRow {
  typename X::T *w, *first, *second;  // whole vectors, zeros past the width; or null
  typename X::T* moment;
};

template <class X, int kKind>
void catch_up_row(const ItemTable& table, const TableRule<typename X::T>& r, const Fixed<X>& f,
                  const MissedSteps& missed, int64_t done, int64_t padded,
                  const MissedRow<X>& row) {
  using T = typename X::T;
  using V = typename X::V;
  constexpr bool kAdam = kKind == t4r_fast::kAdamw || kKind == t4r_fast::kRowwiseAdamw;
  const double ratio = r.beta2 > 0 ? r.beta1 / __builtin_sqrt(r.beta2) : 1.0;
  double power1 = power(r.beta1, missed.base + done), power2 = power(r.beta2, missed.base + done);
  for (int64_t k = 0; k < padded; ++k) row.w[3 * padded + k] = 0;
  const T* const nothing = row.w + 3 * padded;
  for (int64_t i = 0; done < missed.steps; ++done, ++i) {
    if (kAdam && i % kCheckEvery == 0 &&
        !still_moves<X, kKind>(r, padded, ratio, missed.highest_lr, power1, row.w, row.first,
                               row.second, row.moment ? *row.moment : T(0))) {
      break;
    }
    power1 *= r.beta1;
    power2 *= r.beta2;
    const Numbers<X> n(r, missed.lrs[done], power1, power2);
    const V spread = has_row_moment(kKind) ? row_spread<X, kKind>(r, f, n, table.width, padded,
                                                                  nothing, row.w, row.moment)
                                           : X::zero();
    for (int64_t k = 0; k < padded; k += X::L) {
      V x = X::load(row.w + k), a = row.first ? X::load(row.first + k) : X::zero();
      V b = row.second ? X::load(row.second + k) : X::zero();
      update_vector<X, kKind>(f, n, row.first != nullptr, spread, X::zero(), x, a, b);
      X::store(row.w + k, x);
      if (row.first) X::store(row.first + k, a);
      if (row.second) X::store(row.second + k, b);
    }
  }
  if (!kAdam || done == missed.steps) return;
  const double decay = missed.log_decay[missed.steps] - missed.log_decay[done];
  T factor[X::L];
  X::store(factor, X::exp(X::set1(static_cast<T>(decay))));
  const T of_w = decay == 0 ? T(1) : factor[0];
  const T of_first = static_cast<T>(power(r.beta1, missed.steps - done));
  const T of_second = static_cast<T>(power(r.beta2, missed.steps - done));
  for (int64_t k = 0; k < padded; ++k) {
    row.w[k] *= of_w;
    row.first[k] *= of_first;
    if (row.second) row.second[k] *= of_second;
  }
  if (row.moment) *row.moment *= of_second;
}

template <class X, int kKind>
void catch_up(const ItemTable& table, const TableRule<typename X::T>& r, const MissedSteps& missed,
              int64_t at, int64_t stop, typename X::T* scratch) {
  const int64_t width = table.width, padded = (width + X::L - 1) / X::L * X::L;
  constexpr bool kFirstByRow = kKind == t4r_fast::kRowwiseAdagrad;
  const bool has_first = r.first && !kFirstByRow;
  const Fixed<X> f(r);
  for (; at < stop; ++at) {
    const int64_t id = missed.ids ? missed.ids[at] : at;
    const int64_t done = missed.last[id] > missed.base ? missed.last[id] - missed.base : 0;
    if (done >= missed.steps) continue;
    MissedRow<X> row{scratch, has_first ? scratch + padded : nullptr,
                     kKind == t4r_fast::kAdamw ? scratch + 2 * padded : nullptr, nullptr};
    if (has_row_moment(kKind)) row.moment = (kFirstByRow ? r.first : r.second) + id;
    load_row<X>(table.items, id, width, padded, row.w);
    for (int64_t k = 0; row.first && k < padded; ++k) {
      row.first[k] = k < width ? r.first[id * width + k] : 0;
    }
    for (int64_t k = 0; row.second && k < padded; ++k) {
      row.second[k] = k < width ? r.second[id * width + k] : 0;
    }
    catch_up_row<X, kKind>(table, r, f, missed, done, padded, row);
    store_row<X>(row.w, table.items.dtype, id, width, r.items);
    for (int64_t k = 0; row.first && k < width; ++k) r.first[id * width + k] = row.first[k];
    for (int64_t k = 0; row.second && k < width; ++k) r.second[id * width + k] = row.second[k];
    if (missed.ids) missed.last[id] = static_cast<int32_t>(missed.base + missed.steps);
  }
}

// ---- by kind

#define BY_KIND(function, ...)                                    \
  switch (r.kind) {                                               \
    case t4r_fast::kSgd:                                          \
      return function<X, t4r_fast::kSgd>(__VA_ARGS__);            \
    case t4r_fast::kAdagrad:                                      \
      return function<X, t4r_fast::kAdagrad>(__VA_ARGS__);        \
    case t4r_fast::kAdamw:                                        \
      return function<X, t4r_fast::kAdamw>(__VA_ARGS__);          \
    case t4r_fast::kRowwiseAdagrad:                               \
      return function<X, t4r_fast::kRowwiseAdagrad>(__VA_ARGS__); \
    case t4r_fast::kRowwiseAdamw:                                 \
      return function<X, t4r_fast::kRowwiseAdamw>(__VA_ARGS__);   \
  }

template <class X>
void table_step(const TableGradient<typename X::T>& g, const TableRule<typename X::T>& r,
                int64_t tile, int64_t stop, typename X::T* scratch) {
  BY_KIND(step_tiles, g, r, tile, stop, scratch)
}

template <class X>
void table_rows(const TableGradient<typename X::T>& g, const TableRule<typename X::T>& r,
                int64_t at, int64_t stop, typename X::T* scratch) {
  BY_KIND(step_rows, g, r, at, stop, scratch)
}

template <class X>
void table_catch_up(const ItemTable& table, const TableRule<typename X::T>& r,
                    const MissedSteps& missed, int64_t at, int64_t stop, typename X::T* scratch) {
  BY_KIND(catch_up, table, r, missed, at, stop, scratch)
}

#undef BY_KIND

template <class X>
constexpr t4r_fast::TableKernels<typename X::T> table_kernels() {
  return {X::L, pack_rows<X>, table_step<X>, table_norm<X>, table_rows<X>, table_catch_up<X>};
}

}  // namespace
