// Stable sort of ids with their places, by 11 bits at a time: deterministic, and linear where a
// comparison sort is not.
#pragma once

#include <cstdint>
#include <vector>

namespace t4r_fast {

struct IdAt {
  int64_t id, at;
};

// By id >= 0; equal ids stay in order. `spare` is working memory.
inline void sort_by_id(std::vector<IdAt>& entries, std::vector<IdAt>& spare) {
  constexpr int kBits = 11;
  constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  uint64_t any = 0;
  for (const IdAt& e : entries) any |= static_cast<uint64_t>(e.id);
  spare.resize(entries.size());
  for (int shift = 0; shift < 64 && any >> shift != 0; shift += kBits) {
    int64_t starts[kMask + 1] = {};
    for (const IdAt& e : entries) ++starts[static_cast<uint64_t>(e.id) >> shift & kMask];
    int64_t sum = 0;
    for (int64_t& start : starts) {
      const int64_t count = start;
      start = sum;
      sum += count;
    }
    for (const IdAt& e : entries) {
      spare[static_cast<size_t>(starts[static_cast<uint64_t>(e.id) >> shift & kMask]++)] = e;
    }
    entries.swap(spare);
  }
}

}  // namespace t4r_fast
