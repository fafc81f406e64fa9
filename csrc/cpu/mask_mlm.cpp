// mask_mlm: targets, mask and row list of masked language modelling, one pass over the sessions.
// The draws are those of t4r_fast/plain/mask_mlm.py, bit for bit.

#include <optional>

#include "seed.h"
#include "sequence_mask.h"

namespace t4r_fast {
namespace {

enum Mode : int64_t { kTrain, kLast, kShifted, kNext };
enum Draw : uint32_t { kPosition, kRow };

// Bernoulli on each item, one more item for certain, never all items.
void train(bool* mask, int64_t n, int64_t session, const Seed& seed, uint64_t threshold) {
  int64_t masked = 0;
  for (int64_t l = 0; l < n; l += 4) {
    const Words words =
        philox(seed.key, seed.counter(l / 4, static_cast<uint32_t>(session), kPosition));
    const int64_t stop = n - l < 4 ? n - l : 4;
    for (int64_t lane = 0; lane < stop; ++lane)
      masked += mask[l + lane] = words.w[lane] < threshold;
  }
  if (n == 0) return;
  const Words words = philox(seed.key, seed.counter(0, static_cast<uint32_t>(session), kRow));
  const int64_t extra = below(words.w[0], n);
  masked += !mask[extra];
  mask[extra] = true;
  if (masked == n) mask[below(words.w[1], n)] = false;
}

// What is hidden of a session's n items, mode kNext aside.
struct Rule {
  Rule(const std::optional<Tensor>& seed, int64_t threshold, int64_t mode)
      : threshold(static_cast<uint64_t>(threshold)), mode(mode) {
    CHECK(mode >= kTrain && mode <= kNext, "mask_mlm: mode must be 0 to 3; got ", mode);
    CHECK(mode != kTrain || seed.has_value(), "mask_mlm: seed must be given in mode 'train'");
    if (mode == kTrain) drawn = read_seed("mask_mlm", *seed);
  }

  // `mask` is false at first.
  void hide(bool* mask, int64_t n, int64_t session) const {
    if (mode == kTrain) train(mask, n, session, drawn, threshold);
    if (mode == kLast && n > 0) mask[n - 1] = true;
    if (mode == kShifted) {
      for (int64_t l = 0; l < n - 1; ++l) mask[l] = true;
    }
  }
  // How far behind a hidden item its target is.
  int64_t ahead() const { return mode == kShifted; }

  Seed drawn{};
  uint64_t threshold;
  int64_t mode;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_mlm_fwd_cpu(const Tensor& item_ids,
                                                            const std::optional<Tensor>& seed,
                                                            int64_t threshold, int64_t mode,
                                                            int64_t padding_idx) {
  const Sessions sessions("mask_mlm", item_ids, padding_idx);
  const Rule rule(seed, threshold, mode);
  const int64_t positions = sessions.positions + (mode == kNext);
  MaskOutputs out(item_ids, sessions.count, positions);
  int64_t* targets = out.targets.mutable_data_ptr<int64_t>();
  bool* masks = out.mask.mutable_data_ptr<bool>();

  torch::stable::parallel_for(0, sessions.count, kSessionsPerThread, [&](int64_t b, int64_t stop) {
    for (; b < stop; ++b) {
      int64_t* target = targets + b * positions;
      bool* mask = masks + b * positions;
      const int64_t* const items = sessions.row(b);
      const int64_t n = sessions.length(b);
      for (int64_t l = 0; l < positions; ++l) mask[l] = false;
      rule.hide(mask, n, b);
      if (mode == kNext) mask[n] = true;
      // mask is false from position n on, but for kNext: item l + ahead is there
      const int64_t ahead = rule.ahead(), labelled = mode == kNext ? 0 : n;
      for (int64_t l = 0; l < labelled; ++l) {
        const int64_t keep = -int64_t{mask[l]};  // bits, for nobody predicts a branch on a draw
        target[l] = (items[l + ahead] & keep) | (padding_idx & ~keep);
      }
      for (int64_t l = labelled; l < positions; ++l) target[l] = padding_idx;
    }
  });
  sessions.check_padding("mask_mlm");
  return out.list_rows([masks](int64_t i) { return masks[i]; });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_mlm_packed_fwd_cpu(
    const Tensor& item_ids, const Tensor& offsets, const std::optional<Tensor>& seed,
    int64_t threshold, int64_t mode, int64_t padding_idx) {
  const PackedSessions sessions("mask_mlm", item_ids, offsets, padding_idx);
  const Rule rule(seed, threshold, mode);
  CHECK(mode != kNext, "mask_mlm: mode must not be 'next' with offsets");
  PackedOutputs out(sessions);
  bool* replaced = out.replaced.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, sessions.count, kSessionsPerThread, [&](int64_t b, int64_t stop) {
    for (; b < stop; ++b) {
      bool* mask = replaced + sessions.start[b];
      const int64_t n = sessions.length(b);
      for (int64_t l = 0; l < n; ++l) mask[l] = false;
      rule.hide(mask, n, b);
    }
  });
  int64_t* rows = out.rows.mutable_data_ptr<int64_t>();
  int64_t found = 0;
  for (int64_t i = 0; i < sessions.end; ++i) {
    rows[found] = i;  // found <= i: in bounds; overwritten unless i is hidden
    found += replaced[i];
  }
  return out.finish(sessions, found, rule.ahead(), padding_idx);
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("mask_mlm_fwd", TORCH_BOX(&t4r_fast::mask_mlm_fwd_cpu));
  m.impl("mask_mlm_packed_fwd", TORCH_BOX(&t4r_fast::mask_mlm_packed_fwd_cpu));
}
