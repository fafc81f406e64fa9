// mask_causal: targets, mask and row list of next-item prediction in one launch, of padded or of
// packed sessions.

#include "sequence_mask.cuh"

namespace t4r_fast {
namespace {

enum Mode : int64_t { kTrain, kLast, kNext };

struct CausalRule {
  __device__ static const char* padding_message() {
    return "mask_causal: item_ids must have its padding on the right only";
  }
  __device__ static const char* packed_message() {
    return "mask_causal: item_ids with offsets must hold no padding";
  }
  __device__ static const char* offsets_message() {
    return "mask_causal: offsets must rise from 0 to at most the items that there are";
  }
  __device__ static int64_t ahead() { return 1; }

  __device__ int64_t start(int64_t, int64_t items) {
    n = items;
    if (mode == kTrain) return max(n - 1, int64_t{0});
    return mode == kLast ? n >= 2 : n > 0 || reads_empty;
  }

  __device__ Choice at(int64_t l) const {
    // one row per session of "next": position n - 1, and 0 of an empty session that has one
    if (mode == kNext) return {bit_at(l, max(n - 1, int64_t{0})), ~bits_before(l, n), 0};
    const unsigned labelled = mode == kTrain ? bits_before(l, n - 1) : bit_at(l, n - 2);
    return {labelled, mode == kTrain || hide_history ? ~labelled : ~bits_before(l, n), labelled};
  }

  int64_t mode;
  bool hide_history;
  bool reads_empty;  // "next" has a row for an empty session
  int64_t n = 0;
};

__global__ void __launch_bounds__(kThreads)
    mask_causal_fwd_kernel(Sessions sessions, MaskOutputs out, int64_t mode, bool hide_history) {
  CausalRule rule{mode, hide_history, sessions.positions > 0};
  mask_sessions(rule, sessions, out);
}

__global__ void __launch_bounds__(kThreads)
    mask_causal_packed_fwd_kernel(PackedSessions sessions, PackedOutputs out, int64_t mode,
                                  bool hide_history) {
  CausalRule rule{mode, hide_history, false};
  mask_packed_sessions(rule, sessions, out);
}

void check_mode(int64_t mode) {
  CHECK(mode >= kTrain && mode <= kNext, "mask_causal: mode must be 0 to 2; got ", mode);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_causal_fwd_cuda(const Tensor& item_ids,
                                                                int64_t mode, int64_t padding_idx,
                                                                bool hide_history) {
  const Sessions sessions("mask_causal", item_ids, padding_idx);
  check_mode(mode);
  const DeviceGuard guard(item_ids.get_device_index());
  const cudaStream_t stream = current_stream(item_ids);
  MaskTensors out(item_ids, sessions.count, sessions.positions, stream);
  LAUNCH(mask_causal_fwd_kernel, out.tiles, kThreads, 0, stream, sessions, out.outputs(), mode,
         hide_history);
  return {out.targets, out.mask, out.rows, out.count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_causal_packed_fwd_cuda(const Tensor& item_ids,
                                                                       const Tensor& offsets,
                                                                       int64_t mode,
                                                                       int64_t padding_idx,
                                                                       bool hide_history) {
  const PackedSessions sessions("mask_causal", item_ids, offsets, padding_idx);
  check_mode(mode);
  const DeviceGuard guard(item_ids.get_device_index());
  const cudaStream_t stream = current_stream(item_ids);
  PackedTensors out(item_ids, sessions.count, stream);
  LAUNCH(mask_causal_packed_fwd_kernel, out.tiles, kThreads, 0, stream, sessions, out.outputs(),
         mode, hide_history);
  return {out.replaced, out.rows, out.targets, out.count};
}

}  // namespace
}  // namespace t4r_fast

REGISTER_OPS(m) {
  m.impl("mask_causal_fwd", TORCH_BOX(&t4r_fast::mask_causal_fwd_cuda));
  m.impl("mask_causal_packed_fwd", TORCH_BOX(&t4r_fast::mask_causal_packed_fwd_cuda));
}
