// mask_causal: targets, mask and row list of next-item prediction, one pass over the sessions.

#include "sequence_mask.h"

namespace t4r_fast {
namespace {

enum Mode : int64_t { kTrain, kLast, kNext };

// The positions of a session of n items that predict the item behind them.
struct Labelled {
  Labelled(int64_t mode, int64_t n)
      : first(mode == kLast && n >= 2 ? n - 2 : 0), stop(mode == kNext || n < 2 ? 0 : n - 1) {}
  bool operator()(int64_t l) const { return l >= first && l < stop; }
  int64_t first, stop;
};

void check_mode(int64_t mode) {
  CHECK(mode >= kTrain && mode <= kNext, "mask_causal: mode must be 0 to 2; got ", mode);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_causal_fwd_cpu(const Tensor& item_ids, int64_t mode,
                                                               int64_t padding_idx,
                                                               bool hide_history) {
  const Sessions sessions("mask_causal", item_ids, padding_idx);
  check_mode(mode);
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
      const Labelled labelled(mode, n);
      for (int64_t l = 0; l < positions; ++l) {
        target[l] = labelled(l) ? items[l + 1] : padding_idx;
        mask[l] = mode == kTrain || hide_history ? !labelled(l) : l >= n;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_causal_packed_fwd_cpu(const Tensor& item_ids,
                                                                      const Tensor& offsets,
                                                                      int64_t mode,
                                                                      int64_t padding_idx,
                                                                      bool hide_history) {
  const PackedSessions sessions("mask_causal", item_ids, offsets, padding_idx);
  check_mode(mode);
  PackedOutputs out(sessions);
  bool* replaced = out.replaced.mutable_data_ptr<bool>();
  int64_t* rows = out.rows.mutable_data_ptr<int64_t>();
  const bool hides = mode == kTrain || (mode == kLast && hide_history);
  int64_t found = 0;
  for (int64_t b = 0; b < sessions.count; ++b) {
    const int64_t start = sessions.start[b], n = sessions.length(b);
    const Labelled labelled(mode, n);
    for (int64_t l = 0; l < n; ++l) replaced[start + l] = hides && !labelled(l);
    for (int64_t l = labelled.first; l < labelled.stop; ++l) rows[found++] = start + l;
    if (mode == kNext && n > 0) rows[found++] = start + n - 1;
  }
  return out.finish(sessions, found, mode == kNext ? -1 : 1, padding_idx);
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("mask_causal_fwd", TORCH_BOX(&t4r_fast::mask_causal_fwd_cpu));
  m.impl("mask_causal_packed_fwd", TORCH_BOX(&t4r_fast::mask_causal_packed_fwd_cpu));
}
