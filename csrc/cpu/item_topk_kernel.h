// item_topk for one instruction set: scores of a tile against each row's k-th best so far. After
// the first few thousand items hardly any passes, and the rest costs one comparison.
// Included after simd_<set>.h.
#pragma once

#include "item_scores.h"
#include "item_topk.h"

namespace {

using t4r_fast::Candidate;
using t4r_fast::TopkScan;

template <typename T>
T sort_key(T score) {
  return score == score ? score : static_cast<T>(__builtin_inf());  // nan ranks as inf
}

template <typename T>
bool worse(const Candidate<T>& a, const Candidate<T>& b) {
  const T left = sort_key(a.score), right = sort_key(b.score);
  return left < right || (left == right && a.item > b.item);
}

// Puts `entry` at `place` of a heap of `count`, where the worst is on top, and moves it down.
template <typename T>
void sift_down(Candidate<T>* heap, int64_t count, int64_t place, const Candidate<T>& entry) {
  while (2 * place + 1 < count) {
    int64_t child = 2 * place + 1;
    if (child + 1 < count && worse(heap[child + 1], heap[child])) ++child;
    if (!worse(heap[child], entry)) break;
    heap[place] = heap[child];
    place = child;
  }
  heap[place] = entry;
}

template <typename T>
bool is_excluded(const TopkScan<T>& a, int64_t row, int64_t item) {
  if (item == a.padding) return true;
  if (!a.excluded) return false;
  int64_t low = a.excluded_start[row], high = a.excluded_start[row + 1];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (a.excluded[middle] == item) return true;
    if (a.excluded[middle] < item) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return false;
}

// Items come by ascending id: one that only equals the k-th best is worse.
template <typename T>
void offer(const TopkScan<T>& a, int64_t row, int64_t item, T score) {
  if (!(sort_key(score) > a.threshold[row]) || is_excluded(a, row, item)) return;
  Candidate<T>* const heap = a.best + row * a.k;
  const Candidate<T> entry{score, item};
  int64_t& found = a.found[row];
  if (found < a.k) {
    int64_t place = found++;
    while (place > 0 && worse(entry, heap[(place - 1) / 2])) {
      heap[place] = heap[(place - 1) / 2];
      place = (place - 1) / 2;
    }
    heap[place] = entry;
  } else {
    sift_down(heap, a.k, 0, entry);
  }
  if (found == a.k) a.threshold[row] = sort_key(heap[0].score);
}

template <class X>
void topk_scan(const TopkScan<typename X::T>& a, int64_t index, int64_t stop,
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
        typename X::V threshold = X::load(a.threshold + first);
        const T* p = z + c * X::L;
        for (int v = 0; v < tile.count; v += 4, p += 4 * kPanel<T>) {
          // One branch for four items; kTile is a multiple of 4, and what stands past the tile's
          // end is not offered.
          uint32_t passes[4], any = 0;
          for (int j = 0; j < 4; ++j) {
            passes[j] = X::bits(X::not_less_equal(X::load(p + j * kPanel<T>), threshold));
            any |= passes[j];
          }
          if (__builtin_expect(any == 0, 1)) continue;
          for (int j = 0; j < 4 && v + j < tile.count; ++j) {
            for (; passes[j] != 0; passes[j] &= passes[j] - 1) {
              const int i = __builtin_ctz(passes[j]);
              if (first + i >= a.rows.count) break;
              offer(a, first + i, tile.first + v + j, p[j * kPanel<T> + i]);
            }
          }
          threshold = X::load(a.threshold + first);
        }
      }
    }
  }
}

template <class X>
constexpr t4r_fast::TopkKernels<typename X::T> topk_kernels() {
  return {X::L, pack_rows<X>, topk_scan<X>};
}

}  // namespace
