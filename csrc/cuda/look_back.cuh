// Sums over the blocks before one, in one launch: each block leaves its own count in a word and,
// once it knows it, the count up to its end. Blocks are numbered in the order in which they start,
// by a ticket, so those that a block waits for are running or done, whatever the order of blocks
// is. Counts are integers, and a word holds count and state: no fences, and the same sum in every
// order. Source: Merrill, Garland, "Single-pass Parallel Prefix Scan with Decoupled Look-back",
// NVIDIA 2016. No torch: the probes of tests/cuda_on_cpu include it.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

#include <cstdint>

namespace t4r_fast {
namespace {

// The state of a word, zero at first, in its low bits; above them the count.
enum BlockState : unsigned long long { kNotThere, kOwn, kUpToEnd, kBlockStates = 4 };

__device__ void leave(unsigned long long* word, int64_t count, BlockState state) {
  atomicExch(word, static_cast<unsigned long long>(count) * kBlockStates + state);
}

// The counts of blocks 0 to block - 1, whose words are words[0] and so on; `own` is this block's.
// All lanes of one warp call.
__device__ int64_t look_back(unsigned long long* words, unsigned block, int64_t own) {
  constexpr int kLanesOfWarp = 32;
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const int lane = static_cast<int>(threadIdx.x) % kLanesOfWarp;
  if (lane == 0) leave(words + block, own, block == 0 ? kUpToEnd : kOwn);
  int64_t before = 0;
  // 32 blocks at a time: lane i looks at the one that is i before the nearest
  for (int64_t nearest = int64_t{block} - 1; nearest >= 0; nearest -= kLanesOfWarp) {
    unsigned long long found = kUpToEnd;  // before the first block: nothing
    if (nearest >= lane) {
      const volatile unsigned long long* word = words + (nearest - lane);
      do {
        found = *word;
      } while (found % kBlockStates == kNotThere);
    }
    const unsigned ends = __ballot_sync(kAll, found % kBlockStates == kUpToEnd);
    const int last = ends == 0 ? kLanesOfWarp - 1 : __ffs(static_cast<int>(ends)) - 1;
    int64_t counts = lane <= last ? static_cast<int64_t>(found / kBlockStates) : 0;
    for (int lanes = kLanesOfWarp / 2; lanes > 0; lanes /= 2) {
      counts += __shfl_xor_sync(kAll, counts, lanes);
    }
    before += counts;
    if (ends != 0) break;
  }
  if (lane == 0 && block > 0) leave(words + block, before + own, kUpToEnd);
  return before;
}

}  // namespace
}  // namespace t4r_fast
