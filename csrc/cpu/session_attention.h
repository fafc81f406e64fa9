// What csrc/cpu/session_attention.cpp asks of its kernels; plain data only, as item_table.h.
#pragma once

#include "dropout.h"
#include "item_table.h"

namespace t4r_fast {

// Queries of a session whose scores are in memory at once.
constexpr int64_t kQueries = 32;

// (items, heads, width); the elements of a row are next to each other. `rows.stride` is from item
// to item, in elements, as `head` is from head to head.
struct Heads {
  Matrix rows;
  int64_t head;
};

struct Attention {
  Heads q, k, v, keys;             // keys.rows.data is null without relative positions
  Matrix key_bias, position_bias;  // stride from head to head
  int64_t heads, width, padded;    // padded: whole vectors
  int64_t reach, longest;          // M, and the longest session
  bool causal;
  double scale;
  Dropout dropout;
  const int64_t* offsets;
  // Queries by session: those of session b are entries first[b] to first[b + 1].
  const int64_t *first, *query, *place;
};

// Both contiguous, (R, H, Dh) and (R, H).
template <typename T>
struct AttentionOutputs {
  void* out;
  T* lse;
};

// dq (R, H, Dh), dk and dv (U, H, Dh), contiguous. `sums` are 2 * longest - 1 rows of the gradient
// of keys, from row M - longest + 1, and one each of the biases' gradients, all of `padded`.
template <typename T>
struct AttentionGradients {
  Heads dout;
  const T* lse;
  void *dq, *dk, *dv;
  T* sums;
};

template <typename T>
struct AttentionKernels {
  int lanes;
  // Sessions [b, stop) of one head; scratch of attention_scratch bytes, on a cache line.
  void (*forward)(const Attention&, int64_t b, int64_t stop, int64_t head,
                  const AttentionOutputs<T>&, char* scratch);
  void (*backward)(const Attention&, int64_t b, int64_t stop, int64_t head,
                   const AttentionGradients<T>&, char* scratch);
};

// Of both. Rows of items: k, v, dk, dv. Of queries: with either bias, dout, the output, both parts
// of dq. A plane has a number for each query and item, four of which are kept, and a counter of
// 16 bytes for each four. Lines of 64 bytes after each part.
template <typename T>
constexpr int64_t attention_scratch(int64_t longest, int64_t padded) {
  const int64_t plane = kQueries * ((longest + 3) / 4 * 4) + 64;
  const int64_t rows = 4 * longest + 2 * longest + 6 * kQueries + 4;
  return static_cast<int64_t>(sizeof(T)) * (rows * padded + 4 * plane) + plane * 4 + 64 * 32 +
         3 * kQueries * 8;
}

}  // namespace t4r_fast
