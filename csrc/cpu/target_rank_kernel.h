// target_rank for one instruction set. Included after simd_<set>.h.
#pragma once

#include "item_scores.h"
#include "target_rank.h"

namespace {

using t4r_fast::RankScan;

// The target's score by the loop that scores everything else, so that it equals itself, and items
// with equal vectors, bit for bit.
template <class X>
void score_targets(const RankScan<typename X::T>& a, int64_t row, int64_t stop,
                   typename X::T* scratch) {
  using T = typename X::T;
  T* const item = scratch;
  T* const z = scratch + kTile * a.rows.padded;
  T* const bias = z + kTile * kPanel<T>;
  const Matrix& items = a.table.items;
  for (int64_t k = a.rows.width; k < a.rows.padded; ++k) item[k] = 0;
  for (; row < stop; ++row) {
    const int64_t start = row / kPanel<T> * kPanel<T>;
    convert(items, a.target[row] * items.stride, a.rows.width, item);
    // stride 0: the same item in every place
    Tile<T> tile{item, 0, a.rows.padded, a.target[row], 1, false, nullptr, 0, 0, 0};
    if (a.table.bias.data) {
      convert(a.table.bias, a.target[row] * a.table.bias.stride, 1, bias);
      for (int v = 1; v < kTile; ++v) bias[v] = bias[0];
      tile.bias = bias;
    }
    score_panel<X>(tile, a.rows, start, vectors_of_panel<T>(a.rows.count, start, X::L), z,
                   kPanel<T>);
    a.own[row] = z[row - start];
  }
}

// Ties are rare but for the target's own: one row at a time.
template <typename T>
int64_t count_before(const Tile<T>& tile, int64_t target, const T* z, int64_t stride, T own) {
  int64_t before = 0;
  for (int v = 0; v < tile.count && tile.first + v < target; ++v) before += z[v * stride] == own;
  return before;
}

// One vector of rows takes in the scores of a tile, of which `highest` is the highest.
template <class X>
void add_exponentials(int count, const typename X::T* z, typename X::T inverse_temperature,
                      typename X::V highest, typename X::T* top, double* total) {
  using T = typename X::T;
  using V = typename X::V;
  const V scale = X::set1(inverse_temperature);
  T part[X::L];
  if (raise_top<X>(X::mul(highest, scale), top, part)) {
    for (int i = 0; i < X::L; ++i) total[i] *= static_cast<double>(part[i]);
  }
  // One multiplication and subtraction: the product is not rounded, so that lse is as near to that
  // of the exact scores as it can be.
  const V shift = X::sub(X::zero(), X::load(top));
  V sum[2] = {X::zero(), X::zero()};
  int v = 0;
  for (; v + 2 <= count; v += 2) {
    sum[0] = X::add(sum[0], X::exp(X::fma(X::load(z + v * kPanel<T>), scale, shift)));
    sum[1] = X::add(sum[1], X::exp(X::fma(X::load(z + (v + 1) * kPanel<T>), scale, shift)));
  }
  if (v < count) sum[0] = X::add(sum[0], X::exp(X::fma(X::load(z + v * kPanel<T>), scale, shift)));
  X::store(part, X::add(sum[0], sum[1]));
  for (int i = 0; i < X::L; ++i) total[i] += static_cast<double>(part[i]);
}

template <class X, bool kSums>
void scan_tiles(const RankScan<typename X::T>& a, int64_t index, int64_t stop,
                typename X::T* scratch) {
  using T = typename X::T;
  T* const copy = scratch;
  T* const z = scratch + kTile * a.rows.padded;
  T* const bias = z + kTile * kPanel<T>;
  for (; index < stop; ++index) {
    const Tile<T> tile = load_tile(a.table, index, a.rows.padded, copy, bias);
    for (int64_t start = 0; start < a.rows.count; start += kPanel<T>) {
      const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
      score_panel<X>(tile, a.rows, start, vectors, z, kPanel<T>);
      for (int c = 0; c < vectors; ++c) {
        const int64_t first = start + c * X::L;
        const typename X::V own = X::load(a.own + first);
        const T* p = z + c * X::L;
        auto above = X::no_count(), tied = X::no_count();
        typename X::V highest = X::set1(kLowest<T>);
        for (int v = 0; v < tile.count; ++v) {
          const typename X::V x = X::load(p + v * kPanel<T>);
          above = X::count(above, X::not_less_equal(x, own));
          tied = X::count(tied, X::equal(x, own));
          if (kSums) highest = X::max(x, highest);
        }
        if (kSums) {
          add_exponentials<X>(tile.count, p, a.inverse_temperature, highest, a.top + first,
                              a.total + first);
        }
        int32_t higher[X::L], equal[X::L];
        X::store_count(higher, above);
        X::store_count(equal, tied);
        for (int i = 0; i < X::L && first + i < a.rows.count; ++i) {
          const int64_t row = first + i;
          a.above[row] += higher[i];
          if (equal[i] == 0) continue;
          a.tied[row] += equal[i];
          a.tied_before[row] += count_before(tile, a.target[row], p + i, kPanel<T>, a.own[row]);
        }
      }
    }
  }
}

template <class X>
void rank_scan(const RankScan<typename X::T>& a, int64_t index, int64_t stop,
               typename X::T* scratch) {
  a.total ? scan_tiles<X, true>(a, index, stop, scratch)
          : scan_tiles<X, false>(a, index, stop, scratch);
}

template <class X>
constexpr t4r_fast::RankKernels<typename X::T> rank_kernels() {
  return {X::L, pack_rows<X>, score_targets<X>, rank_scan<X>};
}

}  // namespace
