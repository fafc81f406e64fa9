// mask_causal: targets, mask and row list of next-item prediction, one pass over the sessions.

#include "sequence_mask.h"

namespace t4r_fast {
namespace {

enum Mode : int64_t { kTrain, kLast, kNext };

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_causal_fwd_cpu(const Tensor& item_ids, int64_t mode,
                                                               int64_t padding_idx,
                                                               bool hide_history) {
  const Sessions sessions("mask_causal", item_ids, padding_idx);
  CHECK(mode >= kTrain && mode <= kNext, "mask_causal: mode must be 0 to 2; got ", mode);
  const int64_t positions = sessions.positions;
  MaskOutputs out(item_ids, sessions.count, positions);
  int64_t* targets = out.targets.mutable_data_ptr<int64_t>();
  bool* masks = out.mask.mutable_data_ptr<bool>();

  torch::stable::parallel_for(0, sessions.count, kSessionsPerThread, [&](int64_t b, int64_t stop) {
    for (; b < stop; ++b) {
      int64_t* target = targets + b * positions;
      bool* mask = masks + b * positions;
      const int64_t* const items = sessions.row(b);
      const int64_t n = sessions.length(b);
      for (int64_t l = 0; l < positions; ++l) {
        const bool labelled = mode == kTrain ? l < n - 1 : mode == kLast && l == n - 2;
        target[l] = labelled ? items[l + 1] : padding_idx;
        mask[l] = mode == kTrain || hide_history ? !labelled : l >= n;
      }
    }
  });
  sessions.check_padding("mask_causal");
  if (mode != kNext) {
    return out.list_rows([=](int64_t i) { return targets[i] != padding_idx; });
  }
  // One row per session: position n - 1, and 0 of an empty session.
  int64_t next = 0;
  return out.list_rows([&, positions](int64_t i) {
    const int64_t l = i % positions;
    if (l == 0) {
      const int64_t n = sessions.length(i / positions);
      next = n > 0 ? n - 1 : 0;
    }
    return l == next;
  });
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("mask_causal_fwd", TORCH_BOX(&t4r_fast::mask_causal_fwd_cpu));
}
