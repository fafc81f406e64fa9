// mask_mlm: targets, mask and row list of masked language modelling in one launch, of padded or of
// packed sessions.
// The draws are those of t4r_fast/plain/mask_mlm.py, bit for bit; the seed is read on the
// device.

#include "seed.cuh"
#include "sequence_mask.cuh"

namespace t4r_fast {
namespace {

enum Mode : int64_t { kTrain, kLast, kShifted, kNext };
enum Draw : uint32_t { kPosition, kRow };

struct MlmRule {
  __device__ static const char* padding_message() {
    return "mask_mlm: item_ids must have its padding on the right only";
  }
  __device__ static const char* packed_message() {
    return "mask_mlm: item_ids with offsets must hold no padding";
  }
  __device__ static const char* offsets_message() {
    return "mask_mlm: offsets must rise from 0 to at most the items that there are";
  }
  __device__ int64_t ahead() const { return mode == kShifted; }

  __device__ int64_t start(int64_t b, int64_t items) {
    session = static_cast<uint32_t>(b);
    n = items;
    if (mode == kLast) return n > 0;
    if (mode == kShifted) return max(n - 1, int64_t{0});
    if (mode == kNext) return 1;
    const Words words = philox(seed.key, seed.counter(0, session, kRow));
    extra = below(words.w[0], n);
    int64_t masked = 0;
    for (int64_t l = kPositions * (threadIdx.x % kLanes); l < n; l += kStep) {
      masked += __popc(drawn(l));
    }
    masked = session_sum(masked);
    if (masked != n || n == 0) return masked;
    spared = below(words.w[1], n);
    return masked - 1;
  }

  __device__ Choice at(int64_t l) const {
    unsigned masked = 0;
    if (mode == kTrain && l < n) masked = drawn(l) & ~bit_at(l, spared);
    if (mode == kLast) masked = bit_at(l, n - 1);
    if (mode == kShifted) masked = bits_before(l, n - 1);
    if (mode == kNext) return {bit_at(l, n), bit_at(l, n), 0};
    return {masked, masked, masked};
  }

  // Bernoulli on each item, and one more item for certain.
  __device__ unsigned drawn(int64_t l) const {
    const Words words =
        philox(seed.key, seed.counter(static_cast<uint32_t>(l / kPositions), session, kPosition));
    unsigned masked = 0;
    for (int k = 0; k < kPositions; ++k) masked |= unsigned{words.w[k] < threshold} << k;
    return (masked | bit_at(l, extra)) & bits_before(l, n);
  }

  Seed seed;
  uint64_t threshold;
  int64_t mode;
  uint32_t session = 0;
  int64_t n = 0, extra = 0, spared = -1;
};

__global__ void __launch_bounds__(kThreads)
    mask_mlm_fwd_kernel(Sessions sessions, MaskOutputs out, SeedTensor seed, uint64_t threshold,
                        int64_t mode) {
  MlmRule rule{mode == kTrain ? seed.read() : Seed{}, threshold, mode};
  mask_sessions(rule, sessions, out);
}

__global__ void __launch_bounds__(kThreads)
    mask_mlm_packed_fwd_kernel(PackedSessions sessions, PackedOutputs out, SeedTensor seed,
                               uint64_t threshold, int64_t mode) {
  MlmRule rule{mode == kTrain ? seed.read() : Seed{}, threshold, mode};
  mask_packed_sessions(rule, sessions, out);
}

SeedTensor checked_seed(const std::optional<Tensor>& seed, int64_t mode, int32_t device) {
  CHECK(mode >= kTrain && mode <= kNext, "mask_mlm: mode must be 0 to 3; got ", mode);
  CHECK(mode != kTrain || seed.has_value(), "mask_mlm: seed must be given in mode 'train'");
  return mode == kTrain ? SeedTensor("mask_mlm", *seed, device) : SeedTensor{};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_mlm_fwd_cuda(const Tensor& item_ids,
                                                             const std::optional<Tensor>& seed,
                                                             int64_t threshold, int64_t mode,
                                                             int64_t padding_idx) {
  const Sessions sessions("mask_mlm", item_ids, padding_idx);
  const int32_t device = item_ids.get_device_index();
  const SeedTensor read = checked_seed(seed, mode, device);
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(item_ids);
  MaskTensors out(item_ids, sessions.count, sessions.positions + (mode == kNext), stream);
  LAUNCH(mask_mlm_fwd_kernel, out.tiles, kThreads, 0, stream, sessions, out.outputs(), read,
         static_cast<uint64_t>(threshold), mode);
  return {out.targets, out.mask, out.rows, out.count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_mlm_packed_fwd_cuda(
    const Tensor& item_ids, const Tensor& offsets, const std::optional<Tensor>& seed,
    int64_t threshold, int64_t mode, int64_t padding_idx) {
  const PackedSessions sessions("mask_mlm", item_ids, offsets, padding_idx);
  const int32_t device = item_ids.get_device_index();
  const SeedTensor read = checked_seed(seed, mode, device);
  CHECK(mode != kNext, "mask_mlm: mode must not be 'next' with offsets");
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(item_ids);
  PackedTensors out(item_ids, sessions.count, stream);
  LAUNCH(mask_mlm_packed_fwd_kernel, out.tiles, kThreads, 0, stream, sessions, out.outputs(), read,
         static_cast<uint64_t>(threshold), mode);
  return {out.replaced, out.rows, out.targets, out.count};
}

}  // namespace
}  // namespace t4r_fast

REGISTER_OPS(m) {
  m.impl("mask_mlm_fwd", TORCH_BOX(&t4r_fast::mask_mlm_fwd_cuda));
  m.impl("mask_mlm_packed_fwd", TORCH_BOX(&t4r_fast::mask_mlm_packed_fwd_cuda));
}
