// mask_permutation: targets, mask, row list and attention mask of permutation language modelling in
// one launch. The draws are those of t4r_fast/plain/mask_permutation.py, bit for bit; the seed
// is read on the device.

#include <vector>

#include "seed.cuh"
#include "sequence_mask.cuh"

namespace t4r_fast {
namespace {

constexpr const char* kOp = "mask_permutation";
constexpr int kMostSpans = 256;  // 1 KiB of the 4 KiB of a kernel's parameters

enum Mode : int64_t { kTrain, kLast, kNext };
enum Draw : uint32_t { kSpan = 4, kPick = 5, kOrder = 6 };

// The stretch of a span of i + 1 items.
struct Stretches {
  int32_t length[kMostSpans];
  int32_t count;
};

struct PermutationRule {
  __device__ static const char* padding_message() {
    return "mask_permutation: item_ids must have its padding on the right only";
  }
  __device__ static int64_t ahead() { return 0; }

  __device__ int64_t start(int64_t b, int64_t items) {
    session = static_cast<uint32_t>(b);
    n = items;
    if (mode != kTrain) return mode == kNext || n > 0;
    int64_t masked = 0;
    for (int64_t l = kPositions * (threadIdx.x % kLanes); l < n; l += kStep) {
      masked += __popc(drawn(l));
    }
    masked = session_sum(masked);
    first_of_walk();
    if (n == 0) return 0;
    const Words words = philox(seed.key, seed.counter(0, session, kPick));
    if (masked == 0) {
      extra = below(words.w[0], n);
      masked = 1;
    }
    if (masked == n) {
      spared = below(words.w[1], n);
      --masked;
    }
    return masked;
  }

  __device__ Choice at(int64_t l) {
    unsigned masked = 0;
    if (mode == kTrain && l < n) masked = (drawn(l) | bit_at(l, extra)) & ~bit_at(l, spared);
    if (mode == kLast) masked = bit_at(l, n - 1);
    if (mode == kNext) return {bit_at(l, n), bit_at(l, n), 0};
    return {masked, masked, masked};
  }

  // Positions of spans, for rising l: each lane walks by itself.
  __device__ unsigned drawn(int64_t l) {
    if (permute_all) return bits_before(l, n);
    unsigned masked = bits_before(l, stop) & ~bits_before(l, begin);  // the last one may reach here
    while (current < n && current < l + kPositions) {
      const Words words = philox(seed.key, seed.counter(step++, session, kSpan));
      const int64_t span = below(words.w[0], stretches.count) + 1;
      const int64_t stretch = stretches.length[span - 1];
      begin = current + below(words.w[1], stretch - span + 1);
      stop = min(begin + span, n);
      masked |= bits_before(l, stop) & ~bits_before(l, begin);
      current += stretch;
    }
    return masked;
  }

  __device__ void first_of_walk() {
    current = begin = stop = 0;
    step = 0;
  }

  // Where masked position l + k comes in the random order; 0 if it is not masked.
  __device__ void order(int64_t l, unsigned masked, int64_t positions, uint64_t* place) const {
    const Words words =
        philox(seed.key, seed.counter(static_cast<uint32_t>(l / kPositions), session, kOrder));
    for (int k = 0; k < kPositions; ++k) {
      const uint64_t at = static_cast<uint64_t>(l + k);
      // equal words: by position
      const uint64_t drawn = words.w[k] * static_cast<uint64_t>(positions) + at + 1;
      place[k] = masked >> k & 1 ? drawn : 0;
    }
  }

  const Stretches& stretches;
  Seed seed;
  int64_t mode;
  bool permute_all;
  uint32_t session = 0, step = 0;
  int64_t n = 0, extra = -1, spared = -1;
  int64_t current = 0, begin = 0, stop = 0;  // of the next stretch; of the last span
};

// What a lane wrote of the mask at positions l to l + 3.
__device__ unsigned written_mask(const MaskOutputs& out, int64_t b, int64_t l) {
  unsigned masked = 0;
  for (int k = 0; k < kPositions && l + k < out.positions; ++k) {
    masked |= unsigned{out.mask[b * out.positions + l + k]} << k;
  }
  return masked;
}

// Whether row i may not see columns l to l + 3.
__device__ void write_hidden(float* row, int64_t l, int64_t positions, unsigned hidden) {
  if (positions % kPositions == 0) {
    *reinterpret_cast<float4*>(row + l) =
        make_float4(hidden & 1, hidden >> 1 & 1, hidden >> 2 & 1, hidden >> 3 & 1);
    return;
  }
  for (int k = 0; k < kPositions && l + k < positions; ++k) row[l + k] = hidden >> k & 1;
}

// perm_mask of session b by its lanes: each has 4 columns and goes through the rows.
__device__ void write_session(const PermutationRule& rule, const MaskOutputs& out, int64_t b,
                              bool real, float* perm_mask) {
  const int64_t positions = out.positions;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  float* hidden = perm_mask + b * positions * positions;
  for (int64_t step = 0; step < positions; step += kStep) {
    const int64_t l = step + kPositions * lane;
    const bool inside = real && l < positions;
    // a lane reads what it wrote itself
    const unsigned masked = inside ? written_mask(out, b, l) : 0;
    if (rule.mode != kTrain) {
      for (int64_t i = 0; inside && i < positions; ++i) {
        write_hidden(hidden + i * positions, l, positions, masked | ~bits_before(l, i + 1));
      }
      continue;
    }
    uint64_t column[kPositions];
    rule.order(l, masked, positions, column);
    for (int64_t rows = 0; rows < positions; rows += kStep) {
      const int64_t own = rows + kPositions * lane;
      uint64_t row[kPositions];
      rule.order(own, real ? written_mask(out, b, own) : 0, positions, row);
      for (int source = 0; source < kLanes; ++source) {
        for (int k = 0; k < kPositions; ++k) {
          const uint64_t place = __shfl_sync(kAllLanes, row[k], source, kLanes);
          const int64_t i = rows + source * kPositions + k;
          unsigned behind = 0;
          for (int j = 0; j < kPositions; ++j) behind |= unsigned{place <= column[j]} << j;
          if (inside && i < positions) {
            write_hidden(hidden + i * positions, l, positions, masked & behind);
          }
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    mask_permutation_fwd_kernel(Sessions sessions, MaskOutputs out, SeedTensor seed,
                                const __grid_constant__ Stretches stretches, bool permute_all,
                                int64_t mode, float* perm_mask, float* identity) {
  PermutationRule rule{stretches, mode == kTrain ? seed.read() : Seed{}, mode, permute_all};
  const int64_t size = out.positions * out.positions, threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += threads) {
    identity[i] = i % (out.positions + 1) == 0;
  }
  const int64_t b = mask_sessions(rule, sessions, out);
  write_session(rule, out, b, b < sessions.count, perm_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mask_permutation_fwd_cuda(
    const Tensor& item_ids, const std::optional<Tensor>& seed, std::vector<int64_t> contexts,
    bool permute_all, int64_t mode, int64_t padding_idx) {
  const Sessions sessions(kOp, item_ids, padding_idx);
  CHECK(mode >= kTrain && mode <= kNext, kOp, ": mode must be 0 to 2; got ", mode);
  CHECK(mode != kTrain || seed.has_value(), kOp, ": seed must be given in mode 'train'");
  const int64_t spans = static_cast<int64_t>(contexts.size());
  CHECK(spans >= 1, kOp, ": max_span_length must be >= 1");
  CHECK(spans <= kMostSpans, kOp, ": max_span_length must be at most ", kMostSpans,
        " on backend 'cuda'; got ", spans, ": use backend 'plain'");
  Stretches stretches{};
  stretches.count = static_cast<int32_t>(spans);
  for (int32_t i = 0; i < stretches.count; ++i) {
    CHECK(contexts[i] > i && contexts[i] <= INT32_MAX, kOp,
          ": a stretch must hold its span and be below 2**31; got ", contexts[i], " for a span of ",
          i + 1);
    stretches.length[i] = static_cast<int32_t>(contexts[i]);
  }
  const int32_t device = item_ids.get_device_index();
  const SeedTensor read = mode == kTrain ? SeedTensor(kOp, *seed, device) : SeedTensor{};
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(item_ids);
  const int64_t positions = sessions.positions + (mode == kNext);
  MaskTensors out(item_ids, sessions.count, positions, stream);
  Tensor perm_mask =
      torch::stable::new_empty(item_ids, {sessions.count, positions, positions}, ScalarType::Float);
  Tensor identity = torch::stable::new_empty(item_ids, {positions, positions}, ScalarType::Float);
  LAUNCH(mask_permutation_fwd_kernel, out.tiles, kThreads, 0, stream, sessions, out.outputs(), read,
         stretches, permute_all, mode, perm_mask.mutable_data_ptr<float>(),
         identity.mutable_data_ptr<float>());
  return {out.targets, out.mask, out.rows, out.count, perm_mask, identity};
}

}  // namespace
}  // namespace t4r_fast

REGISTER_OPS(m) {
  m.impl("mask_permutation_fwd", TORCH_BOX(&t4r_fast::mask_permutation_fwd_cuda));
}
