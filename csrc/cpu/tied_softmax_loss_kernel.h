// tied_softmax_loss for one instruction set: log-sum-exp of a range of items for all rows, and the
// gradients of that range. Items outside, rows inside: a tile of items is read once.
// Included after simd_<set>.h.
#pragma once

#include "item_scores.h"
#include "tied_softmax_loss.h"

namespace {

using t4r_fast::LossBackward;
using t4r_fast::LossForward;
using t4r_fast::Stash;
using t4r_fast::Target;

// Of a tile's work on all rows at least a part finds them in the second-level cache.
constexpr int64_t kRowsInCache = int64_t{4} << 20;

template <class X>
typename X::V tanh(typename X::V x) {
  using V = typename X::V;
  using T = typename X::T;
  const V a = X::max(X::sub(X::zero(), x), x);
  // Cephes: odd polynomials near 0, where the other form cancels.
  const V s = X::mul(x, x);
  V p;
  if (sizeof(T) == 4) {
    p = X::set1(T(-5.70498872745e-3));
    p = X::fma(p, s, X::set1(T(2.06390887954e-2)));
    p = X::fma(p, s, X::set1(T(-5.37397155531e-2)));
    p = X::fma(p, s, X::set1(T(1.33314422036e-1)));
    p = X::fma(p, s, X::set1(T(-3.33332819422e-1)));
  } else {
    p = X::set1(T(-9.64399179425052238628e-1));
    p = X::fma(p, s, X::set1(T(-9.92877231001918586564e1)));
    p = X::fma(p, s, X::set1(T(-1.61468768441708447952e3)));
    V q = X::add(s, X::set1(T(1.12811678491632931402e2)));
    q = X::fma(q, s, X::set1(T(2.23548839060100448583e3)));
    q = X::fma(q, s, X::set1(T(4.84406305325125486048e3)));
    p = X::div(p, q);
  }
  const V near = X::fma(X::mul(x, s), p, x);
  // 1 from 22 on, also for double; max, so that exp stays finite and nan stays nan
  const V bounded = X::max(X::set1(-44), X::mul(X::set1(-2), a));
  const V e = X::exp(bounded);
  const V far = X::div(X::sub(X::set1(1), e), X::add(X::set1(1), e));
  const V signed_far = X::select(X::greater(X::zero(), x), X::sub(X::zero(), far), far);
  return X::select(X::greater(X::set1(T(0.625)), a), near, signed_far);
}

// z = scores / temperature, capped. Rounded as in the formula, and before anything is subtracted: a
// fused z - top would leave the loss of a lone item at 6e-8 instead of 0.
template <class X>
void finish_scores(int count, int vectors, typename X::T inverse_temperature, typename X::T softcap,
                   typename X::T* z, int64_t stride) {
  if (inverse_temperature == 1 && softcap == 0) return;
  using V = typename X::V;
  const V scale = X::set1(inverse_temperature), cap = X::set1(softcap),
          uncap = X::set1(1 / softcap);
  for (int v = 0; v < count; ++v) {
    for (int c = 0; c < vectors; ++c) {
      typename X::T* p = z + v * stride + c * X::L;
      V x = X::mul(X::load(p), scale);
      if (softcap != 0) x = X::mul(cap, tanh<X>(X::mul(x, uncap)));
      X::store(p, x);
    }
  }
}

// The first target at or after a tile.
inline const Target* find_targets(const Target* targets, int64_t count, int64_t tile) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (targets[low + half].item < tile * kTile) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return targets + low;
}

// times the slope of the cap
template <class X>
ALWAYS_INLINE typename X::V times_slope(typename X::V z, typename X::V inverse_cap,
                                        typename X::V dz) {
  const typename X::V t = X::mul(z, inverse_cap);
  return X::mul(dz, X::sub(X::set1(1), X::mul(t, t)));
}

template <class X>
void scale_row(typename X::T factor, int64_t padded, typename X::T* row) {
  const auto scale = X::set1(factor);
  for (int64_t k = 0; k < padded; k += X::L) X::store(row + k, X::mul(X::load(row + k), scale));
}

// exp(z - shift); where kMean, z becomes that times the slope.
template <class X, bool kMean>
ALWAYS_INLINE typename X::V weight_of(typename X::T* z, typename X::V shift,
                                      typename X::T inverse_cap) {
  const typename X::V x = X::load(z), e = X::exp(X::sub(x, shift));
  if (kMean) X::store(z, inverse_cap == 0 ? e : times_slope<X>(x, X::set1(inverse_cap), e));
  return e;
}

// One vector of rows takes in the scores of a tile. Where kMean, they become the weights of the
// items in the means of these rows, `mean` (rows, padded).
template <class X, bool kMean>
void take_in(int count, typename X::T* z, int64_t stride, typename X::T* top, double* total,
             typename X::T inverse_cap, int64_t rows, int64_t padded, typename X::T* mean) {
  using T = typename X::T;
  using V = typename X::V;
  V highest = X::set1(kLowest<T>);
  for (int v = 0; v < count; ++v) highest = X::max(X::load(z + v * stride), highest);
  T factor[X::L];
  if (raise_top<X>(highest, top, factor)) {
    for (int i = 0; i < X::L; ++i) {
      total[i] *= static_cast<double>(factor[i]);
      if (kMean && i < rows && factor[i] != 1) scale_row<X>(factor[i], padded, mean + i * padded);
    }
  }
  const V shift = X::load(top);
  V sum[2] = {X::zero(), X::zero()};
  int v = 0;
  for (; v + 2 <= count; v += 2) {
    sum[0] = X::add(sum[0], weight_of<X, kMean>(z + v * stride, shift, inverse_cap));
    sum[1] = X::add(sum[1], weight_of<X, kMean>(z + (v + 1) * stride, shift, inverse_cap));
  }
  if (v < count) sum[0] = X::add(sum[0], weight_of<X, kMean>(z + v * stride, shift, inverse_cap));
  T part[X::L];
  X::store(part, X::add(sum[0], sum[1]));
  for (int i = 0; i < X::L; ++i) total[i] += static_cast<double>(part[i]);
}

// Where the scores of a tile and of the panel of rows at `start` are kept; null if they are not.
template <typename T>
T* place_in_stash(const Stash<T>& stash, int64_t index, int64_t start) {
  const int64_t place = index * stash.tiles / stash.of;
  if ((index + 1) * stash.tiles / stash.of == place) return nullptr;
  return stash.data + (place * stash.rows + stash.first + start) * kTile;
}

// Past the caches: backward reads them much later.
template <class X>
void put_into_stash(int count, int vectors, const typename X::T* z, typename X::T* out) {
  for (int v = 0; v < count; ++v, z += kPanel<typename X::T>) {
    for (int c = 0; c < vectors; ++c, out += X::L) X::stream(out, X::load(z + c * X::L));
  }
}

template <class X>
void add_scores(int count, const typename X::T* z, int64_t stride, double* z_sum) {
  typename X::V sum = X::zero();
  for (int v = 0; v < count; ++v) sum = X::add(sum, X::load(z + v * stride));
  typename X::T part[X::L];
  X::store(part, sum);
  for (int i = 0; i < X::L; ++i) z_sum[i] += static_cast<double>(part[i]);
}

// ---- a few rows: vectors of items

// z[row][item] of a tile and of all rows, the lowest number past the table's end.
template <class X>
void few_scores(const Tile<typename X::T>& tile, const PackedRows<typename X::T>& rows,
                typename X::T inverse_temperature, typename X::T softcap, typename X::T* z) {
  using T = typename X::T;
  score_few_rows<X>(tile, rows, z, kTile, 1);
  finish_scores<X>(static_cast<int>(rows.count), kTile / X::L, inverse_temperature, softcap, z,
                   kTile);
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int v = tile.count; v < kTile; ++v) z[row * kTile + v] = kLowest<T>;
  }
}

// As take_in, to the bit, of one row: vectors hold items, and the sums go in the order of take_in.
template <class X, bool kMean>
void take_in_row(int count, typename X::T* z, typename X::T* top, double* total,
                 typename X::T inverse_cap, int64_t padded, typename X::T* mean) {
  using T = typename X::T;
  using V = typename X::V;
  V highest = X::set1(kLowest<T>);
  for (int v = 0; v < kTile; v += X::L) highest = X::max(X::load(z + v), highest);
  if (X::bits(X::greater(highest, X::set1(*top + kSlack)))) {
    T part[X::L];
    X::store(part, highest);
    T higher = *top;
    for (int i = 0; i < X::L; ++i) higher = part[i] > higher ? part[i] : higher;
    X::store(part, X::exp(X::set1(*top - higher)));
    *total *= static_cast<double>(part[0]);
    if (kMean) scale_row<X>(part[0], padded, mean);
    *top = higher;
  }
  const V shift = X::set1(*top);
  T weight[kTile];
  for (int v = 0; v < kTile; v += X::L) {
    X::store(weight + v, weight_of<X, kMean>(z + v, shift, inverse_cap));
  }
  T sum[2] = {0, 0};
  int v = 0;
  for (; v + 2 <= count; v += 2) {
    sum[0] += weight[v];
    sum[1] += weight[v + 1];
  }
  if (v < count) sum[0] += weight[v];
  *total += static_cast<double>(sum[0] + sum[1]);
}

template <class X>
typename X::T inverse_cap(const LossForward<typename X::T>& a) {
  return a.softcap == 0 ? 0 : 1 / a.softcap;
}

template <class X, bool kMean>
void forward_few(const LossForward<typename X::T>& a, const Tile<typename X::T>& tile,
                 const Target*& target, typename X::T* z) {
  few_scores<X>(tile, a.rows, a.inverse_temperature, a.softcap, z);
  const Target* const targets_end = a.targets + a.rows.count;
  const Target* const first = target;
  for (; target < targets_end && target->item < tile.first + tile.count; ++target) {
    a.target_score[target->row] =
        static_cast<double>(z[target->row * kTile + target->item - tile.first]);
  }
  const int64_t padded = a.rows.padded;
  for (int64_t row = 0; row < a.rows.count; ++row) {
    if (a.z_sum) {
      typename X::T sum = 0;  // as add_scores
      for (int v = 0; v < tile.count; ++v) sum += z[row * kTile + v];
      a.z_sum[row] += static_cast<double>(sum);
    }
    take_in_row<X, kMean>(tile.count, z + row * kTile, a.top + row, a.total + row,
                          inverse_cap<X>(a), padded, kMean ? a.mean + row * padded : nullptr);
  }
  if (!kMean) return;
  for (const Target* t = first; t < target; ++t) z[t->row * kTile + t->item - tile.first] = 0;
  add_product<X, kTile, 1, true>(a.rows.count, tile.count, padded, z, 0, items_on_right(tile),
                                 a.mean, padded);
}

// ---- forward

template <class X, bool kMean>
void forward_panel(const LossForward<typename X::T>& a, const Tile<typename X::T>& tile,
                   int64_t index, int64_t start, const Target*& target, typename X::T* z) {
  using T = typename X::T;
  const Target* const targets_end = a.targets + a.rows.count;
  const Target* const first = target;
  const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
  score_panel<X>(tile, a.rows, start, vectors, z, kPanel<T>);
  finish_scores<X>(tile.count, vectors, a.inverse_temperature, a.softcap, z, kPanel<T>);
  for (; target < targets_end && target->item < tile.first + tile.count &&
         target->row < start + kPanel<T>;
       ++target) {
    a.target_score[target->row] =
        static_cast<double>(z[(target->item - tile.first) * kPanel<T> + target->row - start]);
  }
  T* const kept = place_in_stash(a.stash, index, start);
  if (kept) put_into_stash<X>(tile.count, vectors, z, kept);
  const int64_t padded = a.rows.padded;
  for (int c = 0; c < vectors; ++c) {
    const int64_t row = start + c * X::L;
    if (a.z_sum) add_scores<X>(tile.count, z + c * X::L, kPanel<T>, a.z_sum + row);
    take_in<X, kMean>(tile.count, z + c * X::L, kPanel<T>, a.top + row, a.total + row,
                      inverse_cap<X>(a), a.rows.count - row, padded,
                      kMean ? a.mean + row * padded : nullptr);
  }
  if (!kMean) return;
  for (const Target* t = first; t < target; ++t) {
    z[(t->item - tile.first) * kPanel<T> + t->row - start] = 0;
  }
  const int64_t left = a.rows.count - start;
  add_product<X, 1, kPanel<T>, true>(left < kPanel<T> ? left : kPanel<T>, tile.count, padded, z, 0,
                                     items_on_right(tile), a.mean + start * padded, padded);
}

template <class X, bool kMean>
void forward_tiles(const LossForward<typename X::T>& a, int64_t index, int64_t stop,
                   typename X::T* scratch) {
  using T = typename X::T;
  const int64_t padded = a.rows.padded;
  T* const copy = scratch;
  T* const z = copy + kTile * padded;
  T* const bias = z + kTile * kPanel<T>;
  T* const chunks = bias + kTile;
  const bool in_chunks = kMean && padded > kChunk<T> && a.rows.count >= 16;  // as in backward
  const Target* target = find_targets(a.targets, a.rows.count, index);
  for (; index < stop; ++index) {
    Tile<T> tile = load_tile(a.table, index, padded, copy, bias);
    if (in_chunks) to_chunks<X>(&tile, chunks);
    if (a.rows.count <= kFewRows<X::L>) {
      forward_few<X, kMean>(a, tile, target, z);
      continue;
    }
    for (int64_t start = 0; start < a.rows.count; start += kPanel<T>) {
      forward_panel<X, kMean>(a, tile, index, start, target, z);
    }
  }
  X::fence();
}

template <class X>
void loss_forward(const LossForward<typename X::T>& a, int64_t index, int64_t stop,
                  typename X::T* scratch) {
  a.mean ? forward_tiles<X, true>(a, index, stop, scratch)
         : forward_tiles<X, false>(a, index, stop, scratch);
}

// ---- backward

// dz of scores z; w and k of the row are vectors or the same in all lanes.
template <class X>
ALWAYS_INLINE typename X::V score_gradient(typename X::V z, typename X::V shift, typename X::V w,
                                           typename X::V k) {
  return X::fma(X::exp(X::sub(z, shift)), w, k);
}

template <class X>
void score_gradients(int count, int vectors, const LossBackward<typename X::T>& a, int64_t start,
                     const typename X::T* z, int64_t z_stride, typename X::T* dz, int64_t stride) {
  using V = typename X::V;
  const V inverse = X::set1(1 / a.softcap);
  for (int c = 0; c < vectors; ++c) {
    const int64_t row = start + c * X::L;
    const V top = X::load(a.shift + row);
    const V w = X::load(a.weight + row), k = X::load(a.constant + row);
    const typename X::T* in = z + c * X::L;
    typename X::T* out = dz + c * X::L;
    if (a.softcap == 0) {
      for (int v = 0; v < count; ++v, in += z_stride, out += stride) {
        X::store(out, score_gradient<X>(X::load(in), top, w, k));
      }
    } else {
      for (int v = 0; v < count; ++v, in += z_stride, out += stride) {
        const V x = X::load(in);
        X::store(out, times_slope<X>(x, inverse, score_gradient<X>(x, top, w, k)));
      }
    }
  }
}

template <class X>
void write_gradient(const typename X::T* from, Dtype dtype, int64_t offset, int64_t width, bool add,
                    void* to) {
  using T = typename X::T;
  if (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) {
    return round_to_half(from, dtype, width, static_cast<uint16_t*>(to) + offset);
  }
  T* out = static_cast<T*>(to) + offset;
  if (add) {
    for (int64_t k = 0; k < width; ++k) out[k] += from[k];
  } else if (width % X::L == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(typename X::V) == 0) {
    // Past the caches: the table's gradient is read much later.
    for (int64_t k = 0; k < width; k += X::L) X::stream(out + k, X::load(from + k));
  } else {
    for (int64_t k = 0; k < width; ++k) out[k] = from[k];
  }
}

template <class X>
void add_bias_gradient(int count, int64_t rows, const typename X::T* dz, int64_t stride,
                       typename X::T* sums) {
  for (int v = 0; v < count; ++v) {
    const typename X::T* p = dz + v * stride;
    typename X::V sum = X::load(sums + v * X::L);
    int64_t row = 0;
    for (; row + X::L <= rows; row += X::L) sum = X::add(sum, X::load(p + row));
    X::store(sums + v * X::L, sum);
    for (; row < rows; ++row) sums[v * X::L] += p[row];
  }
}

// What the target adds to its dz.
template <typename T>
T target_share(const LossBackward<T>& a, int64_t row, T z) {
  const T t = a.softcap != 0 ? z / a.softcap : 0;
  return a.share[row] * (1 - t * t);
}

// dz of a panel of rows for a tile.
template <class X>
void gradient_panel(const LossBackward<typename X::T>& a, const Tile<typename X::T>& tile,
                    int64_t start, const Target*& target, typename X::T* dz, int64_t stride) {
  using T = typename X::T;
  const Target* const targets_end = a.targets + a.rows.count;
  const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
  const T* z = place_in_stash(a.stash, tile.first / kTile, start);
  int64_t z_stride = vectors * X::L;
  if (z == nullptr) {
    score_panel<X>(tile, a.rows, start, vectors, dz, stride);
    finish_scores<X>(tile.count, vectors, a.inverse_temperature, a.softcap, dz, stride);
    z = dz;
    z_stride = stride;
  }
  const Target* const first = target;
  T extra[kPanel<T>];
  for (; target < targets_end && target->item < tile.first + tile.count &&
         target->row < start + kPanel<T>;
       ++target) {
    const int64_t at = (target->item - tile.first) * z_stride + target->row - start;
    extra[target - first] = target_share(a, target->row, z[at]);
  }
  score_gradients<X>(tile.count, vectors, a, start, z, z_stride, dz, stride);
  for (const Target* t = first; t < target; ++t) {
    dz[(t->item - tile.first) * stride + t->row - start] += extra[t - first];
  }
}

// dz[row][item] of all rows, a few.
template <class X>
void few_gradients(const LossBackward<typename X::T>& a, const Tile<typename X::T>& tile,
                   const Target* target, typename X::T* dz) {
  using T = typename X::T;
  using V = typename X::V;
  few_scores<X>(tile, a.rows, a.inverse_temperature, a.softcap, dz);
  const Target* const targets_end = a.targets + a.rows.count;
  const V inverse = X::set1(1 / a.softcap);
  for (int64_t row = 0; row < a.rows.count; ++row) {
    T* const p = dz + row * kTile;
    const int64_t local =
        target < targets_end && target->row == row && target->item < tile.first + tile.count
            ? (target++)->item - tile.first
            : -1;
    const T extra = local < 0 ? 0 : target_share(a, row, p[local]);
    const V shift = X::set1(a.shift[row]);
    const V w = X::set1(a.weight[row]), k = X::set1(a.constant[row]);
    for (int v = 0; v < kTile; v += X::L) {
      const V x = X::load(p + v);
      const V one = score_gradient<X>(x, shift, w, k);
      X::store(p + v, a.softcap == 0 ? one : times_slope<X>(x, inverse, one));
    }
    if (local >= 0) p[local] += extra;
  }
}

// Tiles that are worked on together.
template <typename T>
struct TileWork {
  Tile<T> tile;
  const Target* target;
  T *gradient, *bias_sums;
};

template <class X>
void write_tile(const LossBackward<typename X::T>& a, const TileWork<typename X::T>& work) {
  using T = typename X::T;
  const int64_t width = a.rows.width;
  for (int v = 0; v < work.tile.count; ++v) {
    const int64_t item = work.tile.first + v;
    if (a.ditems) {
      write_gradient<X>(work.gradient + v * a.rows.padded, a.table.items.dtype, item * width, width,
                        a.add, a.ditems);
    }
    if (a.dbias) {
      T sum = a.add ? a.dbias[item] : 0;
      for (int i = 0; i < X::L; ++i) sum += work.bias_sums[v * X::L + i];
      a.dbias[item] = sum;
    }
  }
}

// Both gradients of a block of rows and a tile.
template <class X>
void backward_block(const LossBackward<typename X::T>& a, TileWork<typename X::T>* work,
                    int64_t block, int64_t block_rows, typename X::T* dz) {
  using T = typename X::T;
  const int64_t padded = a.rows.padded;
  const Tile<T>& tile = work->tile;
  for (int64_t start = block; start < block + block_rows; start += kPanel<T>) {
    T* const part = dz + (start - block);
    gradient_panel<X>(a, tile, start, work->target, part, kBlockStride<T>);
    const int64_t rows_left = block + block_rows - start;
    const int64_t rows = rows_left < kPanel<T> ? rows_left : kPanel<T>;
    if (a.dbias) add_bias_gradient<X>(tile.count, rows, part, kBlockStride<T>, work->bias_sums);
    if (a.drows) {
      add_product<X, 1, kBlockStride<T>, true>(rows, tile.count, padded, part, 0,
                                               items_on_right(tile), a.drows + start * padded,
                                               padded);
    }
  }
  if (a.ditems) {
    const Right<T> rows{a.rows.rows, 0, a.rows.count, block};
    const auto add_block = block == 0 ? add_product<X, kBlockStride<T>, 1, false>
                                      : add_product<X, kBlockStride<T>, 1, true>;
    add_block(tile.count, block_rows, padded, dz, 0, rows, work->gradient, padded);
  }
}

template <class X>
void backward_few(const LossBackward<typename X::T>& a, TileWork<typename X::T>* work,
                  typename X::T* dz) {
  using T = typename X::T;
  const int64_t padded = a.rows.padded;
  const Tile<T>& tile = work->tile;
  few_gradients<X>(a, tile, work->target, dz);
  for (int v = 0; a.dbias && v < tile.count; ++v) {
    for (int64_t row = 0; row < a.rows.count; ++row) {
      work->bias_sums[v * X::L] += dz[row * kTile + v];
    }
  }
  if (a.drows) {
    add_product<X, kTile, 1, true>(a.rows.count, tile.count, padded, dz, 0, items_on_right(tile),
                                   a.drows, padded);
  }
  if (a.ditems) {
    const Right<T> rows{a.rows.rows, 0, a.rows.count, 0};
    add_product<X, 1, kTile, false>(tile.count, a.rows.count, padded, dz, 0, rows, work->gradient,
                                    padded);
  }
}

template <class X>
void loss_backward(const LossBackward<typename X::T>& a, int64_t index, int64_t stop,
                   typename X::T* scratch) {
  using T = typename X::T;
  const int64_t padded = a.rows.padded;
  // Rows that stay in the second-level cache by themselves need no company of tiles: 1% faster.
  const int64_t rows_bytes = 3 * a.rows.count * padded * static_cast<int64_t>(sizeof(T));
  const int64_t together = rows_bytes > kRowsInCache ? t4r_fast::tiles_together<T>(padded) : 1;
  const bool few = a.rows.count > 0 && a.rows.count <= kFewRows<X::L>;
  T* const copy = scratch;
  T* const dz = copy + kTile * padded;
  T* next = dz + kTile * kBlockStride<T>;
  const bool in_chunks = padded > kChunk<T> && a.rows.count >= 16;  // pays from 16 uses on
  TileWork<T> works[t4r_fast::kTiles];
  T *chunks[t4r_fast::kTiles], *bias[t4r_fast::kTiles];
  for (int64_t t = 0; t < together; ++t) {
    chunks[t] = next;
    works[t].gradient = chunks[t] + kTile * padded;
    works[t].bias_sums = works[t].gradient + kTile * padded;
    bias[t] = works[t].bias_sums + kTile * X::L;
    next = bias[t] + kTile;
  }
  const Target* target = find_targets(a.targets, a.rows.count, index);
  const Target* const targets_end = a.targets + a.rows.count;
  for (; index < stop; index += together) {
    const int64_t count = stop - index < together ? stop - index : together;
    for (int64_t t = 0; t < count; ++t) {
      TileWork<T>& work = works[t];
      T* const room = in_chunks ? copy : chunks[t];
      work.tile = load_tile(a.table, index + t, padded, room, bias[t], together);
      if (in_chunks) to_chunks<X>(&work.tile, chunks[t]);
      work.target = target;
      while (target < targets_end && target->item < (index + t + 1) * kTile) ++target;
      if (a.dbias) __builtin_memset(work.bias_sums, 0, sizeof(T) * kTile * X::L);
      if (a.rows.count == 0) __builtin_memset(work.gradient, 0, sizeof(T) * kTile * padded);
    }
    for (int64_t t = 0; few && t < count; ++t) backward_few<X>(a, &works[t], dz);
    for (int64_t block = 0; !few && block < a.rows.count; block += kBlock<T>) {
      const int64_t left = a.rows.count - block;
      for (int64_t t = 0; t < count; ++t) {
        backward_block<X>(a, &works[t], block, left < kBlock<T> ? left : kBlock<T>, dz);
      }
    }
    for (int64_t t = 0; t < count; ++t) write_tile<X>(a, works[t]);
  }
  X::fence();
}

template <class X>
constexpr t4r_fast::LossKernels<typename X::T> loss_kernels() {
  return {X::L, pack_rows<X>, loss_forward<X>, loss_backward<X>};
}

}  // namespace
