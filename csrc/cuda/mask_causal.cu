// mask_causal: targets, mask and row list of next-item prediction in one launch.

#include "sequence_mask.cuh"

namespace t4r_fast {
namespace {

enum Mode : int64_t { kTrain, kLast, kNext };

struct CausalRule {
  __device__ static const char* padding_message() {
    return "mask_causal: item_ids must have its padding on the right only";
  }
  __device__ static int64_t ahead() { return 1; }

  __device__ int64_t start(int64_t, int64_t items) {
    n = items;
    if (mode == kTrain) return max(n - 1, int64_t{0});
    return mode == kLast ? n >= 2 : positions > 0;
  }

  __device__ Choice at(int64_t l) const {
    // one row per session of "next": position n - 1, and 0 of an empty session
    if (mode == kNext) return {bit_at(l, max(n - 1, int64_t{0})), ~bits_before(l, n), 0};
    const unsigned labelled = mode == kTrain ? bits_before(l, n - 1) : bit_at(l, n - 2);
    return {labelled, mode == kTrain || hide_history ? ~labelled : ~bits_before(l, n), labelled};
  }

  int64_t mode, positions;
  bool hide_history;
  int64_t n = 0;
};

__global__ void __launch_bounds__(kThreads)
    mask_causal_fwd_kernel(Sessions sessions, MaskOutputs out, int64_t mode, bool hide_history) {
  CausalRule rule{mode, sessions.positions, hide_history};
  mask_sessions(rule, sessions, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_causal_fwd_cuda(const Tensor& item_ids,
                                                                int64_t mode, int64_t padding_idx,
                                                                bool hide_history) {
  const Sessions sessions("mask_causal", item_ids, padding_idx);
  CHECK(mode >= kTrain && mode <= kNext, "mask_causal: mode must be 0 to 2; got ", mode);
  const DeviceGuard guard(item_ids.get_device_index());
  const cudaStream_t stream = current_stream(item_ids);
  MaskTensors out(item_ids, sessions.count, sessions.positions, stream);
  LAUNCH(mask_causal_fwd_kernel, out.tiles, kThreads, 0, stream, sessions, out.outputs(), mode,
         hide_history);
  return {out.targets, out.mask, out.rows, out.count};
}

}  // namespace
}  // namespace t4r_fast

REGISTER_OPS(m) {
  m.impl("mask_causal_fwd", TORCH_BOX(&t4r_fast::mask_causal_fwd_cuda));
}
