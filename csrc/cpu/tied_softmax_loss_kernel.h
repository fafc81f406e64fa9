// tied_softmax_loss for one instruction set: log-sum-exp of a range of items for all rows, and the
// gradients of that range. Items outside, rows inside: a tile of items is read once.
// Included after simd_<set>.h.
#pragma once

#include "item_scores.h"
#include "tied_softmax_loss.h"

namespace {

using t4r_fast::LossBackward;
using t4r_fast::LossForward;
using t4r_fast::Target;

template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? static_cast<T>(-__FLT_MAX__) : static_cast<T>(-__DBL_MAX__);

// Sums move to a new top only where an item exceeds the old one by this much: e^8 is far from
// overflow, and nearly all tiles go without.
constexpr int kSlack = 8;

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

// One vector of rows takes in the scores of a tile.
template <class X>
void take_in(int count, const typename X::T* z, int64_t stride, typename X::T* top, double* total) {
  using T = typename X::T;
  using V = typename X::V;
  V highest = X::set1(kLowest<T>);
  for (int v = 0; v < count; ++v) highest = X::max(X::load(z + v * stride), highest);
  V shift = X::load(top);
  if (X::bits(X::greater(highest, X::add(shift, X::set1(kSlack))))) {
    const V higher = X::max(highest, shift);
    T factor[X::L];
    X::store(factor, X::exp(X::sub(shift, higher)));
    for (int i = 0; i < X::L; ++i) total[i] *= static_cast<double>(factor[i]);
    X::store(top, higher);
    shift = higher;
  }
  V sum[2] = {X::zero(), X::zero()};
  int v = 0;
  for (; v + 2 <= count; v += 2) {
    sum[0] = X::add(sum[0], X::exp(X::sub(X::load(z + v * stride), shift)));
    sum[1] = X::add(sum[1], X::exp(X::sub(X::load(z + (v + 1) * stride), shift)));
  }
  if (v < count) sum[0] = X::add(sum[0], X::exp(X::sub(X::load(z + v * stride), shift)));
  T part[X::L];
  X::store(part, X::add(sum[0], sum[1]));
  for (int i = 0; i < X::L; ++i) total[i] += static_cast<double>(part[i]);
}

template <class X>
void add_scores(int count, const typename X::T* z, int64_t stride, double* z_sum) {
  typename X::V sum = X::zero();
  for (int v = 0; v < count; ++v) sum = X::add(sum, X::load(z + v * stride));
  typename X::T part[X::L];
  X::store(part, sum);
  for (int i = 0; i < X::L; ++i) z_sum[i] += static_cast<double>(part[i]);
}

template <class X>
void loss_forward(const LossForward<typename X::T>& a, int64_t index, int64_t stop,
                  typename X::T* scratch) {
  using T = typename X::T;
  T* const copy = scratch;
  T* const z = copy + kTile * a.rows.padded;
  T* const bias = z + kTile * kPanel<T>;
  const Target* target = find_targets(a.targets, a.rows.count, index);
  const Target* const targets_end = a.targets + a.rows.count;
  for (; index < stop; ++index) {
    const Tile<T> tile = load_tile(a.table, index, a.rows.padded, copy, bias);
    for (int64_t start = 0; start < a.rows.count; start += kPanel<T>) {
      const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
      score_panel<X>(tile, a.rows, start, vectors, z, kPanel<T>);
      finish_scores<X>(tile.count, vectors, a.inverse_temperature, a.softcap, z, kPanel<T>);
      for (; target < targets_end && target->item < tile.first + tile.count &&
             target->row < start + kPanel<T>;
           ++target) {
        a.target_score[target->row] =
            static_cast<double>(z[(target->item - tile.first) * kPanel<T> + target->row - start]);
      }
      for (int c = 0; c < vectors; ++c) {
        const int64_t row = start + c * X::L;
        take_in<X>(tile.count, z + c * X::L, kPanel<T>, a.top + row, a.total + row);
        if (a.z_sum) add_scores<X>(tile.count, z + c * X::L, kPanel<T>, a.z_sum + row);
      }
    }
  }
}

// ---- backward

template <class X>
void score_gradients(int count, int vectors, const typename X::T* shift,
                     const typename X::T* weight, const typename X::T* constant,
                     typename X::T softcap, typename X::T* z, int64_t stride) {
  using V = typename X::V;
  for (int c = 0; c < vectors; ++c) {
    const V top = X::load(shift + c * X::L);
    const V w = X::load(weight + c * X::L), k = X::load(constant + c * X::L);
    typename X::T* p = z + c * X::L;
    if (softcap == 0) {
      for (int v = 0; v < count; ++v, p += stride) {
        X::store(p, X::fma(X::exp(X::sub(X::load(p), top)), w, k));
      }
    } else {
      const V inverse = X::set1(1 / softcap);
      for (int v = 0; v < count; ++v, p += stride) {
        const V x = X::load(p), t = X::mul(x, inverse);
        const V dz = X::fma(X::exp(X::sub(x, top)), w, k);
        X::store(p, X::mul(dz, X::sub(X::set1(1), X::mul(t, t))));
      }
    }
  }
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits & 0x80000000;
  bits ^= sign;
  uint32_t out;
  if (bits >= 0x47800000) {  // 65536 and more, inf, nan
    out = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {  // denormal: the addition rounds at the right place
    const float shifted = as_float(bits) + 0.5f;
    __builtin_memcpy(&out, &shifted, sizeof out);
    out -= 0x3f000000;
  } else {
    out = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(out | sign >> 16);
}

template <class X>
void write_gradient(const typename X::T* from, Dtype dtype, int64_t offset, int64_t width, bool add,
                    void* to) {
  using T = typename X::T;
  if (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) {
    uint16_t* out = static_cast<uint16_t*>(to) + offset;
    const bool brain = dtype == Dtype::kBFloat16;
    for (int64_t k = 0; k < width; ++k) {
      const float x = static_cast<float>(from[k]);
      out[k] = brain ? to_bfloat16(x) : to_float16(x);
    }
    return;
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

// dz of a panel of rows for a tile.
template <class X>
void gradient_panel(const LossBackward<typename X::T>& a, const Tile<typename X::T>& tile,
                    int64_t start, const Target*& target, typename X::T* dz, int64_t stride) {
  using T = typename X::T;
  const Target* const targets_end = a.targets + a.rows.count;
  const int vectors = vectors_of_panel<T>(a.rows.count, start, X::L);
  score_panel<X>(tile, a.rows, start, vectors, dz, stride);
  finish_scores<X>(tile.count, vectors, a.inverse_temperature, a.softcap, dz, stride);
  const Target* const first = target;
  T extra[kPanel<T>];
  for (; target < targets_end && target->item < tile.first + tile.count &&
         target->row < start + kPanel<T>;
       ++target) {
    T share = a.share[target->row];
    if (a.softcap != 0) {
      const T t = dz[(target->item - tile.first) * stride + target->row - start] / a.softcap;
      share *= 1 - t * t;
    }
    extra[target - first] = share;
  }
  score_gradients<X>(tile.count, vectors, a.shift + start, a.weight + start, a.constant + start,
                     a.softcap, dz, stride);
  for (const Target* t = first; t < target; ++t) {
    dz[(t->item - tile.first) * stride + t->row - start] += extra[t - first];
  }
}

template <class X>
void loss_backward(const LossBackward<typename X::T>& a, int64_t index, int64_t stop,
                   typename X::T* scratch) {
  using T = typename X::T;
  const int64_t padded = a.rows.padded, width = a.rows.width;
  T* const copy = scratch;
  T* const chunks = copy + kTile * padded;
  T* const gradient = chunks + kTile * padded;
  T* const dz = gradient + kTile * padded;
  T* const bias = dz + kTile * kBlockStride<T>;
  T* const bias_sums = bias + kTile;
  // Zen 4, width 256: 91% of the floor with the smaller blocks, 87% with the larger; width 64 the
  // other way round, 91% and 87%.
  const int64_t step = padded > 2 * kChunk<T> ? kBlock<T> / 2 : kBlock<T>;
  const Target* target = find_targets(a.targets, a.rows.count, index);
  for (; index < stop; ++index) {
    const Tile<T> tile = load_tile(a.table, index, padded, copy, bias);
    Right<T> items{};
    if (a.drows) items = items_on_right<X>(tile, padded, a.rows.count, chunks);
    if (a.dbias) __builtin_memset(bias_sums, 0, sizeof(T) * kTile * X::L);
    if (a.rows.count == 0) __builtin_memset(gradient, 0, sizeof(T) * kTile * padded);
    for (int64_t block = 0; block < a.rows.count; block += step) {
      const int64_t left = a.rows.count - block;
      const int64_t block_rows = left < step ? left : step;
      for (int64_t start = block; start < block + block_rows; start += kPanel<T>) {
        T* const part = dz + (start - block);
        gradient_panel<X>(a, tile, start, target, part, kBlockStride<T>);
        const int64_t rows_left = block + block_rows - start;
        const int64_t rows = rows_left < kPanel<T> ? rows_left : kPanel<T>;
        if (a.dbias) add_bias_gradient<X>(tile.count, rows, part, kBlockStride<T>, bias_sums);
        if (a.drows) {
          add_product<X, 1, kBlockStride<T>, true>(rows, tile.count, padded, part, 0, items,
                                                   a.drows + start * padded, padded);
        }
      }
      if (a.ditems) {
        const Right<T> rows{a.rows.rows, 0, a.rows.count, block};
        const auto add_block = block == 0 ? add_product<X, kBlockStride<T>, 1, false>
                                          : add_product<X, kBlockStride<T>, 1, true>;
        add_block(tile.count, block_rows, padded, dz, 0, rows, gradient, padded);
      }
    }
    for (int v = 0; v < tile.count; ++v) {
      const int64_t item = tile.first + v;
      if (a.ditems) {
        write_gradient<X>(gradient + v * padded, a.table.items.dtype, item * width, width, a.add,
                          a.ditems);
      }
      if (a.dbias) {
        T sum = a.add ? a.dbias[item] : 0;
        for (int i = 0; i < X::L; ++i) sum += bias_sums[v * X::L + i];
        a.dbias[item] = sum;
      }
    }
  }
  X::fence();
}

template <class X>
constexpr t4r_fast::LossKernels<typename X::T> loss_kernels() {
  return {X::L, pack_rows<X>, loss_forward<X>, loss_backward<X>};
}

}  // namespace
