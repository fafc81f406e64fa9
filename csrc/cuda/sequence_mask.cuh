// What mask_mlm, mask_causal and mask_permutation share: reading sessions, padded or packed,
// writing targets and masks, and the ordered list of chosen rows, all in one launch.
//
// A session is taken by 8 lanes, each with 4 positions at a time: the words of one Philox counter.
// A block takes 32 sessions, its tile, and first counts the rows that each chooses. A warp sums the
// counts within the tile and gets those of the tiles before it from look_back.cuh. The second pass
// over the positions writes. Row f, before which r are chosen, goes to place r of the list if it is
// chosen; else its -1 goes to the place as far from the list's end as rows before it were not
// chosen. So every place is written once, and nobody waits for the total. The list of packed
// sessions ends where their items end; each place behind is its item's.
#pragma once

#include <cstring>
#include <optional>
#include <tuple>

#include "../draws.h"
#include "common.cuh"
#include "look_back.cuh"

namespace t4r_fast {
namespace {

constexpr int kPositions = 4;               // of a lane at a time
constexpr int kLanes = 8;                   // of a session
constexpr int kStep = kPositions * kLanes;  // positions of a session at a time
constexpr int kThreads = 256;               // of a block
constexpr int kTile = kThreads / kLanes;    // sessions of a block
static_assert(kTile == kWarp, "a warp sums the counts of a tile");

// In the order of the stream; a node of its own in a captured graph.
void zero(void* data, size_t bytes, cudaStream_t stream) {
#ifdef __CUDACC__
  const cudaError_t error = cudaMemsetAsync(data, 0, bytes, stream);
  CHECK(error == cudaSuccess, "t4r_fast: memory was not cleared: ", cudaGetErrorString(error));
#else
  static_cast<void>(stream);
  std::memset(data, 0, bytes);
#endif
}

// Padded sessions, as the kernels read them.
struct Sessions {
  Sessions(const char* op, const Tensor& item_ids, int64_t padding_idx) : padding_idx(padding_idx) {
    CHECK_DIM(op, item_ids, 2, "(B, L)");
    CHECK_INT64(op, item_ids);
    data = item_ids.const_data_ptr<int64_t>();
    count = item_ids.size(0);
    positions = item_ids.size(1);
    stride_b = item_ids.stride(0);
    stride_l = item_ids.stride(1);
  }
  __device__ int64_t item(int64_t b, int64_t l) const { return data[b * stride_b + l * stride_l]; }
  const int64_t* data;
  int64_t count, positions, stride_b, stride_l, padding_idx;
};

// Sessions one after the other; session b begins at start(b).
struct PackedSessions {
  PackedSessions(const char* op, const Tensor& item_ids, const Tensor& offsets, int64_t padding_idx)
      : padding_idx(padding_idx) {
    CHECK_DIM(op, item_ids, 1, "(U,)");
    CHECK_INT64(op, item_ids);
    CHECK_DIM(op, offsets, 1, "(B + 1,)");
    CHECK_INT64(op, offsets);
    CHECK(offsets.size(0) > 0, op, ": offsets must have shape (B + 1,), one entry at least");
    CHECK(offsets.get_device_index() == item_ids.get_device_index(), op,
          ": offsets must be on device ", item_ids.get_device_index(), "; got ",
          offsets.get_device_index());
    data = item_ids.const_data_ptr<int64_t>();
    starts = offsets.const_data_ptr<int64_t>();
    count = offsets.size(0) - 1;
    size = item_ids.size(0);
    stride = item_ids.stride(0);
    start_stride = offsets.stride(0);
  }
  __device__ int64_t start(int64_t b) const { return starts[b * start_stride]; }
  __device__ int64_t end() const { return start(count); }
  __device__ int64_t item(int64_t b, int64_t l) const { return data[(start(b) + l) * stride]; }
  const int64_t *data, *starts;
  int64_t count, size, stride, start_stride, padding_idx;
};

// What the kernels write. `positions` is L, or L + 1 where outputs have a position more.
struct MaskOutputs {
  int64_t positions;
  int64_t* targets;
  bool* mask;
  int64_t* rows;
  int64_t* count;
  // Zeros: the number of tiles that have started, then a word for each. Null if there is one tile.
  unsigned long long* scan;
};

struct PackedOutputs {
  bool* replaced;
  int64_t* rows;
  int64_t* targets;
  int64_t* count;
  unsigned long long* scan;  // as above
};

constexpr unsigned kAllPositions = (1u << kPositions) - 1;

// The blocks of a launch, and the words that they leave for each other.
struct Tiles {
  Tiles(const Tensor& like, int64_t sessions, cudaStream_t stream)
      : tiles(grid_for(sessions, kTile, kMostTiles)) {
    CHECK(sessions <= kMostTiles * kTile, "masks: at most ", kMostTiles * kTile,
          " sessions at once; got ", sessions);
    if (tiles > 1) {
      scan = torch::stable::new_empty(like, {int64_t{tiles} + 1});
      zero(scan->mutable_data_ptr<int64_t>(), sizeof(int64_t) * (size_t{tiles} + 1), stream);
    }
  }

  unsigned long long* words() {
    if (!scan) return nullptr;
    return reinterpret_cast<unsigned long long*>(scan->mutable_data_ptr<int64_t>());
  }

  static constexpr int64_t kMostTiles = (int64_t{1} << 31) - 1;  // of a grid
  std::optional<Tensor> scan;
  unsigned tiles;
};

// The tensors behind MaskOutputs, on the device of `like`.
struct MaskTensors : Tiles {
  MaskTensors(const Tensor& like, int64_t sessions, int64_t positions, cudaStream_t stream)
      : Tiles(like, sessions, stream),
        targets(torch::stable::new_empty(like, {sessions, positions})),
        mask(torch::stable::new_empty(like, {sessions, positions}, ScalarType::Bool)),
        rows(torch::stable::new_empty(like, {sessions * positions})),
        count(torch::stable::new_empty(like, {})) {}

  MaskOutputs outputs() {
    return {targets.size(1),
            targets.mutable_data_ptr<int64_t>(),
            mask.mutable_data_ptr<bool>(),
            rows.mutable_data_ptr<int64_t>(),
            count.mutable_data_ptr<int64_t>(),
            words()};
  }

  Tensor targets, mask, rows, count;
};

struct PackedTensors : Tiles {
  PackedTensors(const Tensor& like, int64_t sessions, cudaStream_t stream)
      : Tiles(like, sessions, stream),
        replaced(torch::stable::new_empty(like, {like.size(0)}, ScalarType::Bool)),
        rows(torch::stable::new_empty(like, {like.size(0)})),
        targets(torch::stable::new_empty(like, {like.size(0)})),
        count(torch::stable::new_empty(like, {})) {}

  PackedOutputs outputs() {
    return {replaced.mutable_data_ptr<bool>(), rows.mutable_data_ptr<int64_t>(),
            targets.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>(), words()};
  }

  Tensor replaced, rows, targets, count;
};

// Sets of a lane's 4 positions, one bit each; of `masked` the other bits mean nothing.
struct Choice {
  unsigned row, masked, labelled;
};

// Positions l + k before `end`.
__device__ unsigned bits_before(int64_t l, int64_t end) {
  const int64_t k = end - l;
  return k <= 0 ? 0 : k >= kPositions ? kAllPositions : (1u << k) - 1;
}

__device__ unsigned bit_at(int64_t l, int64_t position) {
  return bits_before(l, position + 1) & ~bits_before(l, position);
}

// Over the lanes of a session, or of the warp; all lanes of the warp call.
template <typename T>
__device__ T session_sum(T value) {
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

template <typename T>
__device__ T largest(T value, int lanes) {
  while ((lanes /= 2) > 0) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

// The number of items of session b; 0 behind the last session.
template <typename Rule>
__device__ int64_t session_length(const Sessions& sessions, int64_t b) {
  int64_t items = 0, end = 0;
  if (b < sessions.count) {
    for (int64_t l = kPositions * (threadIdx.x % kLanes); l < sessions.positions; l += kStep) {
      for (int k = 0; k < kPositions && l + k < sessions.positions; ++k) {
        if (sessions.item(b, l + k) != sessions.padding_idx) {
          ++items;
          end = l + k + 1;
        }
      }
    }
  }
  items = session_sum(items);
  DEVICE_CHECK(largest(end, kLanes) == items, Rule::padding_message());
  return items;
}

template <typename Rule>
__device__ int64_t session_length(const PackedSessions& sessions, int64_t b) {
  if (b >= sessions.count) return 0;
  const int64_t start = sessions.start(b), stop = sessions.start(b + 1), n = stop - start;
  DEVICE_CHECK((b > 0 || start == 0) && start >= 0 && start <= stop && stop <= sessions.end(),
               Rule::offsets_message());
  for (int64_t l = threadIdx.x % kLanes; l < n; l += kLanes) {
    DEVICE_CHECK(sessions.item(b, l) != sessions.padding_idx, Rule::packed_message());
  }
  return n;
}

// How many positions of a session of n items are written, and how many steps its warp takes for
// them times kStep: for the longest of its sessions.
__device__ inline int64_t written(const MaskOutputs& out, int64_t) {
  return out.positions;
}
__device__ inline int64_t written_by_warp(const MaskOutputs& out, int64_t) {
  return out.positions;
}
__device__ inline int64_t written(const PackedOutputs&, int64_t n) {
  return n;
}
__device__ inline int64_t written_by_warp(const PackedOutputs&, int64_t n) {
  return largest(n, kWarp);
}

// Turns the counts of the tile's sessions into the numbers of rows chosen before them, by one warp.
template <typename Outputs>
__device__ void place_sessions(int64_t* counts, unsigned tile, const Outputs& out) {
  const unsigned lane = threadIdx.x % kWarp;
  const int64_t own = counts[lane];
  int64_t up_to = own;
  for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, up_to, lanes);
    if (lane >= lanes) up_to += other;
  }
  const int64_t of_tile = __shfl_sync(kAllLanes, up_to, kWarp - 1);
  const int64_t before = out.scan ? look_back(out.scan + 1, tile, of_tile) : 0;
  counts[lane] = before + up_to - own;
  if (lane == 0 && tile + 1 == gridDim.x) *out.count = before + of_tile;
}

struct alignas(16) TwoIds {
  int64_t id[2];
};

// Writes positions l to l + 3 of session b. `next` rows are chosen before them.
__device__ void write_positions(const Sessions& sessions, const MaskOutputs& out, int64_t b,
                                int64_t l, Choice choice, int64_t ahead, int64_t next) {
  const int64_t first = b * out.positions + l, size = sessions.count * out.positions;
  int64_t target[kPositions];
  for (int k = 0; k < kPositions; ++k) {
    const bool labelled = choice.labelled >> k & 1;
    target[k] = labelled ? sessions.item(b, l + k + ahead) : sessions.padding_idx;
  }
  if (out.positions % kPositions == 0) {  // whole and aligned: 16 and 4 bytes at once
    TwoIds* targets = reinterpret_cast<TwoIds*>(out.targets + first);
    targets[0] = {{target[0], target[1]}};
    targets[1] = {{target[2], target[3]}};
    // bit k becomes byte k
    *reinterpret_cast<uint32_t*>(out.mask + first) =
        (choice.masked & kAllPositions) * 0x00204081u & 0x01010101u;
  } else {
    for (int k = 0; k < kPositions && l + k < out.positions; ++k) {
      out.targets[first + k] = target[k];
      out.mask[first + k] = choice.masked >> k & 1;
    }
  }
  for (int k = 0; k < kPositions && l + k < out.positions; ++k) {
    const int64_t row = first + k;
    const bool chosen = choice.row >> k & 1;
    out.rows[chosen ? next : size - 1 - (row - next)] = chosen ? row : -1;
    next += chosen;
  }
}

__device__ inline void write_positions(const PackedSessions& sessions, const PackedOutputs& out,
                                       int64_t b, int64_t l, Choice choice, int64_t ahead,
                                       int64_t next) {
  const int64_t stop = sessions.start(b + 1), end = sessions.end();
  int64_t item = sessions.start(b) + l;
  for (int k = 0; k < kPositions && item < stop; ++k, ++item) {
    const bool chosen = choice.row >> k & 1, labelled = choice.labelled >> k & 1;
    const int64_t place = chosen ? next : end - 1 - (item - next);
    out.rows[place] = chosen ? item : -1;
    out.targets[place] = labelled ? sessions.item(b, l + k + ahead) : sessions.padding_idx;
    out.replaced[item] = choice.masked >> k & 1;
    next += chosen;
  }
}

// The whole of an op. A rule has
//   int64_t start(b, n)       how many rows session b of n items chooses; all its lanes call
//   Choice at(l)              its choice at positions l to l + 3, for rising l
//   static int64_t ahead      the target of position l is item l + ahead
//   padding_message()         of items behind padding
//   packed_message(), offsets_message()   for packed sessions: of padding, of wrong offsets
// Gives the session of the calling lane.
template <typename Rule, typename Input, typename Outputs>
__device__ int64_t mask_sessions(Rule& rule, const Input& sessions, const Outputs& out) {
  SHARED(tile, unsigned);
  SHARED(before, int64_t[kTile]);
  if (threadIdx.x == 0) tile = out.scan ? static_cast<unsigned>(atomicAdd(out.scan, 1ull)) : 0;
  __syncthreads();
  const int64_t b = int64_t{tile} * kTile + threadIdx.x / kLanes;
  const bool real = b < sessions.count;
  const int64_t n = session_length<Rule>(sessions, b);
  const int64_t chosen = rule.start(b, n);
  if (threadIdx.x % kLanes == 0) before[threadIdx.x / kLanes] = real ? chosen : 0;
  __syncthreads();
  if (threadIdx.x < kWarp) place_sessions(before, tile, out);
  __syncthreads();

  int64_t next = before[threadIdx.x / kLanes];
  const int64_t stop = written(out, n), warp_stop = written_by_warp(out, n);
  for (int64_t step = 0; step < warp_stop; step += kStep) {
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int64_t l = step + kPositions * lane;
    const Choice choice = rule.at(l);
    const int own = __popc(choice.row);
    int up_to = own;
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      const int other = __shfl_up_sync(kAllLanes, up_to, lanes, kLanes);
      if (lane >= lanes) up_to += other;
    }
    if (real && l < stop) {
      write_positions(sessions, out, b, l, choice, rule.ahead(), next + up_to - own);
    }
    next += __shfl_sync(kAllLanes, up_to, kLanes - 1, kLanes);
  }
  return b;
}

// The same of packed sessions, with the places behind them.
template <typename Rule>
__device__ void mask_packed_sessions(Rule& rule, const PackedSessions& sessions,
                                     const PackedOutputs& out) {
  const int64_t end = sessions.end(), step = int64_t{gridDim.x} * kThreads;
  DEVICE_CHECK(end >= 0 && end <= (sessions.count == 0 ? 0 : sessions.size),
               Rule::offsets_message());
  int64_t i = end + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; i < sessions.size; i += step) {
    out.replaced[i] = false;
    out.rows[i] = -1;
    out.targets[i] = sessions.padding_idx;
  }
  mask_sessions(rule, sessions, out);
}

}  // namespace
}  // namespace t4r_fast
