// sampled_softmax_loss for one instruction set: rows against gathered candidates, a panel of rows
// and a tile of candidates at a time. Included after simd_<set>.h.
#pragma once

#include "item_scores.h"
#include "sampled_softmax_loss.h"

namespace {

using t4r_fast::Candidates;
using t4r_fast::Hits;
using t4r_fast::RowBackward;
using t4r_fast::RowForward;
using t4r_fast::SampledBackward;
using t4r_fast::SampledForward;

// Rows of the table on their way while one is copied: random rows come at the memory's latency.
constexpr int64_t kAhead = 12;

template <typename T>
void prefetch_row(const Matrix& from, int64_t id, int64_t width) {
  const int64_t size = item_bytes(from.dtype);
  const char* p = static_cast<const char*>(from.data) + id * from.stride * size;
  for (int64_t at = 0; at < width * size; at += 64) __builtin_prefetch(p + at);
}

template <class X>
void gather_rows(const Matrix& from, const int64_t* ids, int64_t count, int64_t width,
                 int64_t padded, typename X::T* out) {
  using T = typename X::T;
  for (int64_t i = 0; i < count && i < kAhead; ++i) prefetch_row<T>(from, ids[i], width);
  for (int64_t i = 0; i < count; ++i, out += padded) {
    if (i + kAhead < count) prefetch_row<T>(from, ids[i + kAhead], width);
    convert(from, ids[i] * from.stride, width, out);
    for (int64_t k = width; k < padded; ++k) out[k] = 0;
  }
}

// Gathered for this op: in the caches, and all of it is there up to whole tiles.
template <typename T>
Tile<T> tile_of(const Candidates<T>& candidates, int64_t first, int count, int64_t padded) {
  return {candidates.items + first * padded, padded, padded, first, count, false, nullptr, 0, 0, 0};
}

// Logits of a tile of candidates for a panel of rows.
template <class X>
void tile_logits(const PackedRows<typename X::T>& rows, const Candidates<typename X::T>& candidates,
                 const Hits<typename X::T>& hits, typename X::T inverse_temperature, int64_t start,
                 int vectors, int64_t first, int count, typename X::T* z, int64_t stride) {
  using T = typename X::T;
  score_panel<X>(tile_of(candidates, first, count, rows.padded), rows, start, vectors, z, stride);
  const auto scale = X::set1(inverse_temperature);
  for (int v = 0; v < count; ++v) {
    const auto minus = X::set1(-candidates.shift[first + v]);
    for (int c = 0; c < vectors; ++c) {
      T* p = z + v * stride + c * X::L;
      X::store(p, X::fma(X::load(p), scale, minus));
    }
  }
  const int64_t stop = start + vectors * X::L < rows.count ? start + vectors * X::L : rows.count;
  for (int64_t row = start; row < stop; ++row) {
    const int64_t place = hits.place[row] - first;
    if (place < 0 || place >= count) continue;
    T& logit = z[place * stride + row - start];
    logit = hits.add ? logit + hits.add[row] : hits.value;
  }
}

// Constants have a weight in the sum and no gradient.
template <typename T>
void drop_constants(const Hits<T>& hits, int64_t start, int64_t stop, int64_t first, int count,
                    T* p, int64_t stride) {
  if (hits.add) return;
  for (int64_t row = start; row < stop; ++row) {
    const int64_t place = hits.place[row] - first;
    if (place >= 0 && place < count) p[place * stride + row - start] = 0;
  }
}

template <typename T>
void scale_row(T factor, int64_t padded, T* mean) {
  for (int64_t k = 0; k < padded; ++k) mean[k] *= factor;
}

// One vector of rows takes in the logits of a tile, which become weights exp(z - top).
template <class X>
void take_in(int count, int64_t rows, typename X::T* z, int64_t stride, typename X::T* top,
             double* total, typename X::T* mean, int64_t padded) {
  using T = typename X::T;
  using V = typename X::V;
  V highest = X::set1(kLowest<T>);
  for (int v = 0; v < count; ++v) highest = X::max(X::load(z + v * stride), highest);
  V shift = X::load(top);
  if (X::bits(X::greater(highest, X::add(shift, X::set1(kSlack))))) {
    const V higher = X::max(highest, shift);
    T factor[X::L];
    X::store(factor, X::exp(X::sub(shift, higher)));
    for (int i = 0; i < X::L; ++i) {
      total[i] *= static_cast<double>(factor[i]);
      if (mean && i < rows && factor[i] != 1) scale_row(factor[i], padded, mean + i * padded);
    }
    X::store(top, higher);
    shift = higher;
  }
  V sum[2] = {X::zero(), X::zero()};
  for (int v = 0; v < count; ++v) {
    const V e = X::exp(X::sub(X::load(z + v * stride), shift));
    X::store(z + v * stride, e);
    sum[v % 2] = X::add(sum[v % 2], e);
  }
  T part[X::L];
  X::store(part, X::add(sum[0], sum[1]));
  for (int i = 0; i < X::L; ++i) total[i] += static_cast<double>(part[i]);
}

// Panels first to stop.
template <class X>
void sampled_forward(const SampledForward<typename X::T>& a, int64_t panel, int64_t last,
                     typename X::T* z) {
  using T = typename X::T;
  constexpr int64_t kStride = kPanel<T>;
  const int64_t padded = a.rows.padded;
  for (; panel < last; ++panel) {
    const int64_t start = panel * kStride;
    const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
    const int64_t stop = start + kStride < a.rows.count ? start + kStride : a.rows.count;
    for (int i = 0; i < vectors * X::L; ++i) {
      a.top[start + i] = kLowest<T>;
      a.total[start + i] = 0;
    }
    T* const mean = a.mean ? a.mean + start * padded : nullptr;
    if (mean) __builtin_memset(mean, 0, sizeof(T) * (stop - start) * padded);
    for (int64_t first = 0; first < a.candidates.count; first += kTile) {
      const int64_t left = a.candidates.count - first;
      const int count = static_cast<int>(left < kTile ? left : kTile);
      tile_logits<X>(a.rows, a.candidates, a.hits, a.inverse_temperature, start, vectors, first,
                     count, z, kStride);
      for (int c = 0; c < vectors; ++c) {
        const int64_t row = start + c * X::L;
        take_in<X>(count, stop - row, z + c * X::L, kStride, a.top + row, a.total + row,
                   mean ? mean + c * X::L * padded : nullptr, padded);
      }
      if (!mean) continue;
      drop_constants(a.hits, start, stop, first, count, z, kStride);
      const Right<T> items{a.candidates.items + first * padded, padded, kTile, 0};
      add_product<X, 1, kPanel<T>, true>(stop - start, count, padded, z, 0, items, mean, padded);
    }
  }
}

template <class X>
void panel_gradients(const SampledBackward<typename X::T>& a, int64_t start, int64_t first,
                     int count, typename X::T* dz, int64_t stride) {
  using T = typename X::T;
  const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
  tile_logits<X>(a.rows, a.candidates, a.hits, a.inverse_temperature, start, vectors, first, count,
                 dz, stride);
  for (int c = 0; c < vectors; ++c) {
    const auto shift = X::load(a.shift + start + c * X::L);
    const auto weight = X::load(a.weight + start + c * X::L);
    for (int v = 0; v < count; ++v) {
      T* p = dz + v * stride + c * X::L;
      X::store(p, X::mul(X::exp(X::sub(X::load(p), shift)), weight));
    }
  }
  const int64_t stop = start + kPanel<T> < a.rows.count ? start + kPanel<T> : a.rows.count;
  drop_constants(a.hits, start, stop, first, count, dz, stride);
}

template <class X>
double sum_of(int64_t count, const typename X::T* p) {
  typename X::V sum = X::zero();
  int64_t i = 0;
  for (; i + X::L <= count; i += X::L) sum = X::add(sum, X::load(p + i));
  typename X::T part[X::L];
  X::store(part, sum);
  double total = 0;
  for (int lane = 0; lane < X::L; ++lane) total += static_cast<double>(part[lane]);
  for (; i < count; ++i) total += static_cast<double>(p[i]);
  return total;
}

template <class X>
void sampled_backward(const SampledBackward<typename X::T>& a, typename X::T* scratch) {
  using T = typename X::T;
  constexpr int64_t kStride = kBlockStride<T>;
  const int64_t padded = a.rows.padded, width = a.rows.width;
  T* const gradient = scratch;
  T* const dz = gradient + kTile * padded;
  for (int64_t first = 0; first < a.candidates.count; first += kTile) {
    const int64_t left = a.candidates.count - first;
    const int count = static_cast<int>(left < kTile ? left : kTile);
    double bias[kTile] = {};
    __builtin_memset(gradient, 0, sizeof(T) * count * padded);
    for (int64_t block = 0; block < a.rows.count; block += kBlock<T>) {
      const int64_t left = a.rows.count - block, rows = left < kBlock<T> ? left : kBlock<T>;
      for (int64_t start = block; start < block + rows; start += kPanel<T>) {
        panel_gradients<X>(a, start, first, count, dz + start - block, kStride);
      }
      for (int v = 0; a.dbias && v < count; ++v) bias[v] += sum_of<X>(rows, dz + v * kStride);
      const Right<T> of_rows{a.rows.rows + block * padded, padded, a.rows.count, 0};
      add_product<X, kStride, 1, true>(count, rows, padded, dz, 0, of_rows, gradient, padded);
    }
    for (int v = 0; v < count; ++v) {
      const int64_t place = a.place[first + v];
      T* out = a.ditems + place * width;
      const T* from = gradient + v * padded;
      const T factor = a.factor[first + v];
      for (int64_t k = 0; k < width; ++k) out[k] += from[k] * factor;
      if (a.dbias) a.dbias[place] += bias[v] * static_cast<double>(factor);
    }
  }
}

// ---- one row with its own candidates, one item with the rows that drew it

template <class X>
typename X::T dot(const typename X::T* a, const typename X::T* b, int64_t padded) {
  typename X::V sum = X::zero();
  for (int64_t k = 0; k < padded; k += X::L) {
    sum = X::fma(X::load(a + k), X::load(b + k), sum);
  }
  return X::sum(sum);
}

// Rounded once.
template <class X>
typename X::T logit(const typename X::T* a, const typename X::T* b, int64_t padded,
                    typename X::T scale, double shift) {
  const double score = static_cast<double>(dot<X>(a, b, padded));
  return static_cast<typename X::T>(score * static_cast<double>(scale) - shift);
}

template <class X>
void add_scaled(typename X::T factor, const typename X::T* from, int64_t padded,
                typename X::T* to) {
  const auto scale = X::set1(factor);
  for (int64_t k = 0; k < padded; k += X::L) {
    X::store(to + k, X::fma(scale, X::load(from + k), X::load(to + k)));
  }
}

template <class X>
void row_forward(const RowForward<typename X::T>& a) {
  using T = typename X::T;
  T highest = kLowest<T>;
  for (int64_t v = 0; v < a.count; ++v) {
    a.z[v] +=
        logit<X>(a.hidden, a.items + v * a.padded, a.padded, a.inverse_temperature, a.shift[v]);
    highest = a.z[v] > highest ? a.z[v] : highest;
  }
  if (highest > *a.top + kSlack) {
    T factor[X::L];
    X::store(factor, X::exp(X::set1(*a.top - highest)));
    *a.total *= static_cast<double>(factor[0]);
    if (a.mean) scale_row(factor[0], a.padded, a.mean);
    *a.top = highest;
  }
  const auto shift = X::set1(*a.top);
  typename X::V sum = X::zero();
  for (int64_t v = a.count; v % X::L != 0; ++v) a.z[v] = -__builtin_inf();
  for (int64_t v = 0; v < a.count; v += X::L) {
    const auto e = X::exp(X::sub(X::load(a.z + v), shift));
    X::store(a.z + v, e);
    sum = X::add(sum, e);
  }
  T part[X::L];
  X::store(part, sum);
  for (int i = 0; i < X::L; ++i) *a.total += static_cast<double>(part[i]);
  if (!a.mean) return;
  // A sum of sums: one long sum would round each time.
  __builtin_memset(a.spare, 0, sizeof(T) * a.padded);
  for (int64_t v = 0; v < a.count; ++v) {
    add_scaled<X>(a.z[v], a.items + v * a.padded, a.padded, a.spare);
  }
  add_scaled<X>(1, a.spare, a.padded, a.mean);
}

template <class X>
void row_backward(const RowBackward<typename X::T>& a) {
  using T = typename X::T;
  // The sum of some thousand entries as a sum of sums: one long sum would round each time.
  constexpr int64_t kPart = 64;
  double bias = 0;
  for (int64_t start = 0; start < a.count; start += X::L) {
    if (start % kPart == 0) __builtin_memset(a.spare, 0, sizeof(T) * a.padded);
    const int count = static_cast<int>(a.count - start < X::L ? a.count - start : X::L);
    T z[X::L] = {}, weight[X::L] = {};
    for (int i = 0; i < count; ++i) {
      const int64_t row = a.row[start + i];
      z[i] = logit<X>(a.item, a.rows + row * a.padded, a.padded, a.inverse_temperature,
                      static_cast<double>(a.lower[start + i]) + static_cast<double>(a.shift[row]));
      weight[i] = a.weight[row];
    }
    T dz[X::L];
    X::store(dz, X::mul(X::exp(X::load(z)), X::load(weight)));
    for (int i = 0; i < count; ++i) {
      add_scaled<X>(dz[i], a.rows + a.row[start + i] * a.padded, a.padded, a.spare);
      bias += static_cast<double>(dz[i]);
    }
    if ((start + X::L) % kPart == 0 || start + X::L >= a.count) {
      add_scaled<X>(a.factor, a.spare, a.padded, a.ditem);
    }
  }
  *a.dbias = bias * static_cast<double>(a.factor);
}

template <class X>
constexpr t4r_fast::SampledKernels<typename X::T> sampled_kernels() {
  return {X::L,           pack_rows<X>,   gather_rows<X>, sampled_forward<X>, sampled_backward<X>,
          row_forward<X>, row_backward<X>};
}

}  // namespace
