// What the kernels of the three item ops are given. Plain data: files for one instruction set
// include this, so there must be no function here that a linker could share.
#pragma once

#include <stdint.h>

namespace t4r_fast {

// A panel is 192 bytes wide, 48 float rows: 3 vectors of AVX-512, 6 of AVX2. A tile of 96 items of
// width 64 (24 kB) and its scores for a panel (18 kB) stay in the second-level cache.
template <typename T>
constexpr int kPanel = 192 / sizeof(T);
constexpr int kTile = 96;
// With so many rows the loss has vectors of items. Scores have the same bits as in vectors of rows.
template <int kLanes>
constexpr int kFewRows = kLanes > 8 ? 8 : 7;
// Rows between two visits of a tile's gradient.
template <typename T>
constexpr int kBlock = 4 * kPanel<T>;
// From item to item in a block of scores: an odd number of cache lines, so that a column of a tile
// uses all sets.
template <typename T>
constexpr int kBlockStride = kBlock<T> + 64 / sizeof(T);
// Matrices that stand on the right in a product are stored chunk after chunk of this many columns,
// each with all its rows: 96 rows of a chunk are 24 kB side by side and stay in the first-level
// cache, which rows of width 256 would not (their stride maps them to a quarter of its sets).
template <typename T>
constexpr int kChunk = 256 / sizeof(T);

enum class Dtype { kFloat32, kFloat16, kBFloat16, kFloat64 };

// The elements of a row are next to each other.
struct Matrix {
  const void* data;
  int64_t stride;  // elements from row to row
  Dtype dtype;
};

struct ItemTable {
  Matrix items;
  Matrix bias;  // data is null without bias; stride from item to item
  int64_t count, width;
};

// Rows that take part, converted to the type of the sums, twice. `panels` stands for products with
// items: panels of kPanel rows, each [k][row], so that a vector holds one element of several rows
// and sums over items need no horizontal additions. `rows` is [row][padded]: whole vectors, zeros
// past `width`, in chunks of `chunk` columns (kChunk, or `padded` for rows one after the other).
template <typename T>
struct PackedRows {
  int64_t count, width, padded, chunk;
  T *panels, *rows;
};

}  // namespace t4r_fast
