// The factors of dropout for one instruction set: Philox4x32-10 (see csrc/philox.h) for as many
// counters at once as a vector has words. Included after simd_<set>.h.
#pragma once

#include "dropout.h"
#include "float_types.h"

namespace {

using t4r_fast::Dropout;
using t4r_fast::DropoutRow;

// Columns that are drawn at once.
constexpr int kDrawn = 4 * W32::L;

// How many numbers Draws::factors writes.
constexpr int64_t drawn_columns(int64_t columns) {
  return (columns + kDrawn - 1) / kDrawn * kDrawn;
}

// What a site draws, made once for all rows.
struct Draws {
  explicit Draws(const Dropout& dropout)
      : least(dropout.least), scale(dropout.scale), counter(W32::load(W32::kCounter)) {
    uint32_t low = static_cast<uint32_t>(dropout.key);
    uint32_t high = static_cast<uint32_t>(dropout.key >> 32);
    for (int round = 0; round < kRounds; ++round) {
      keys[round][0] = W32::set1(low);
      keys[round][1] = W32::set1(high);
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
  }

  // 0 where a column is dropped, else 1 / (1 - probability), for the columns [first, first +
  // columns) of a row and on to a multiple of kDrawn: `out` has room for drawn_columns(columns).
  // `first` is a multiple of 4. What draws nothing is not asked.
  template <class X>
  void factors(const DropoutRow& row, int64_t first, int64_t columns, typename X::T* out) const {
    // The first round's product of the session is that of all columns.
    const uint64_t of_session = uint64_t{kSecond} * row.session;
    const W32::V c0 = W32::exclusive_or(W32::set1(static_cast<uint32_t>(of_session >> 32)),
                                        W32::set1(row.position), keys[0][0]);
    const W32::V c1 = W32::set1(static_cast<uint32_t>(of_session));
    const W32::V head = W32::set1(row.head);
    const typename X::V factor = X::set1(static_cast<typename X::T>(scale));
    const uint32_t block = static_cast<uint32_t>(first / 4);
    const auto start = [&](int64_t k, W32::V* w) {
      const W32::V number = W32::add(counter, W32::set1(block + static_cast<uint32_t>(k / 4)));
      w[3] = W32::product(number, W32::set1(kFirst));
      w[0] = c0;
      w[1] = c1;
      w[2] = W32::exclusive_or(W32::high(w[3]), head, keys[0][1]);
    };
    int64_t k = 0;
    for (; k + kDrawn < columns; k += 2 * kDrawn) {
      W32::V w[8];
      start(k, w);
      start(k + kDrawn, w + 4);
      rounds<2>(w);
      W32::select(w, least, factor, out + k);
      W32::select(w + 4, least, factor, out + k + kDrawn);
    }
    if (k < columns) {
      W32::V w[4];
      start(k, w);
      rounds<1>(w);
      W32::select(w, least, factor, out + k);
    }
  }

 protected:
  static constexpr int kRounds = 10;
  static constexpr uint32_t kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;

  // All rounds but the first, of two sets of counters side by side: one after the other waits for
  // its products, and there is room for little more than one in the schedulers.
  template <int kSets>
  ALWAYS_INLINE void rounds(W32::V* w) const {
#pragma GCC unroll 9
    for (int round = 1; round < kRounds; ++round) {
#pragma GCC unroll 2
      for (int set = 0; set < kSets; ++set) {
        W32::V* const v = w + 4 * set;
        const W32::V first = W32::product(v[0], W32::set1(kFirst));
        const W32::V second = W32::product(v[2], W32::set1(kSecond));
        v[0] = W32::exclusive_or(W32::high(second), v[1], keys[round][0]);
        v[2] = W32::exclusive_or(W32::high(first), v[3], keys[round][1]);
        v[1] = second;
        v[3] = first;
      }
    }
  }

  uint32_t least;
  double scale;
  W32::V counter, keys[kRounds][2];
};

}  // namespace
