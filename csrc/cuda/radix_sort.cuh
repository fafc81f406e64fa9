// A stable sort of several lists of (key, position) by key, all lists in the same launches.
//
// Digits of 8 bits, the lowest first. A pass counts the digits of each tile of entries, turns the
// counts into places, and moves the entries. An entry's place follows from the entries before it
// alone, so the result is the same in every run.
#pragma once

#include "common.cuh"

namespace t4r_fast {
namespace {

constexpr int kDigits = 256, kSortThreads = kDigits, kSortWarps = kSortThreads / kWarp;
constexpr int kTileRounds = 4, kTile = kTileRounds * kSortThreads;

// Lists of n entries each; list c starts at c * n.
struct Lists {
  uint32_t* keys;
  uint32_t* positions;
};

struct SortPass {
  Lists from, to;
  uint32_t* counts;  // (lists, tiles, kDigits): of a tile, then the place of its first entry
  uint32_t n, tiles;
  int shift;
};

__device__ inline uint32_t digit_of(const SortPass& pass, uint32_t key) {
  return (key >> pass.shift) % kDigits;
}

// A block for each tile (x) and list (y).
__global__ void __launch_bounds__(kSortThreads)
    count_digits_kernel(const __grid_constant__ SortPass pass) {
  SHARED(counts, uint32_t[kDigits]);
  counts[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t* keys = pass.from.keys + size_t{blockIdx.y} * pass.n;
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = blockIdx.x * kTile + round * kSortThreads + threadIdx.x;
    if (i < pass.n) atomicAdd(&counts[digit_of(pass, keys[i])], 1u);
  }
  __syncthreads();
  const size_t tile = size_t{blockIdx.y} * pass.tiles + blockIdx.x;
  pass.counts[tile * kDigits + threadIdx.x] = counts[threadIdx.x];
}

// Sum of the values of the threads before this one, in a block of kSortThreads.
__device__ inline uint32_t sum_before(uint32_t value) {
  SHARED(warp_sums, uint32_t[kSortWarps]);
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  for (uint32_t w = 0; w < warp; ++w) sum += warp_sums[w];
  return sum - value;
}

// A block for each list, a thread for each digit: counts of tiles become places.
__global__ void __launch_bounds__(kSortThreads)
    place_digits_kernel(const __grid_constant__ SortPass pass) {
  uint32_t* counts = pass.counts + size_t{blockIdx.x} * pass.tiles * kDigits + threadIdx.x;
  uint32_t total = 0;
  for (uint32_t tile = 0; tile < pass.tiles; ++tile) total += counts[size_t{tile} * kDigits];
  uint32_t place = sum_before(total);
  for (uint32_t tile = 0; tile < pass.tiles; ++tile) {
    const uint32_t count = counts[size_t{tile} * kDigits];
    counts[size_t{tile} * kDigits] = place;
    place += count;
  }
}

// A block for each tile (x) and list (y), in rounds of one entry per thread.
__global__ void __launch_bounds__(kSortThreads)
    move_entries_kernel(const __grid_constant__ SortPass pass) {
  SHARED(counts, uint32_t[kSortWarps][kDigits]);  // of the round, then the place of a warp's first
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const size_t list = size_t{blockIdx.y} * pass.n;
  const size_t tile = size_t{blockIdx.y} * pass.tiles + blockIdx.x;
  uint32_t next = pass.counts[tile * kDigits + threadIdx.x];  // of digit threadIdx.x
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = blockIdx.x * kTile + round * kSortThreads + threadIdx.x;
    const bool inside = i < pass.n;
    const uint32_t key = inside ? pass.from.keys[list + i] : 0;
    const uint32_t digit = inside ? digit_of(pass, key) : kDigits;
    const uint32_t peers = __match_any_sync(kAllLanes, digit);
    const uint32_t rank = __popc(peers & ((1u << lane) - 1u));
    for (uint32_t d = lane; d < kDigits; d += kWarp) counts[warp][d] = 0;
    __syncwarp();
    if (inside && rank == 0) counts[warp][digit] = __popc(peers);
    __syncthreads();
    for (int w = 0; w < kSortWarps; ++w) {
      const uint32_t count = counts[w][threadIdx.x];
      counts[w][threadIdx.x] = next;
      next += count;
    }
    __syncthreads();
    if (inside) {
      const size_t to = list + counts[warp][digit] + rank;
      pass.to.keys[to] = key;
      pass.to.positions[to] = pass.from.positions[list + i];
    }
    __syncwarp();
  }
}

inline uint32_t sort_tiles(uint32_t n) {
  return (n + kTile - 1) / kTile;
}

// Sorts `lists` lists of n > 0 entries with keys of up to `bits` bits; gives the sorted ones, which
// are `entries` or `spare`. counts has room for (lists, sort_tiles(n), kDigits).
inline Lists sort_lists(Lists entries, Lists spare, uint32_t* counts, unsigned lists, uint32_t n,
                        int bits, cudaStream_t stream) {
  const uint32_t tiles = sort_tiles(n);
  for (int shift = 0; shift < bits; shift += 8) {
    const SortPass pass{entries, spare, counts, n, tiles, shift};
    LAUNCH(count_digits_kernel, dim3(tiles, lists), kSortThreads, 0, stream, pass);
    LAUNCH(place_digits_kernel, dim3(lists), kSortThreads, 0, stream, pass);
    LAUNCH(move_entries_kernel, dim3(tiles, lists), kSortThreads, 0, stream, pass);
    std::swap(entries, spare);
  }
  return entries;
}

}  // namespace
}  // namespace t4r_fast
