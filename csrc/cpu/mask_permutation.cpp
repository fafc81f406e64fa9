// mask_permutation: targets, mask, row list and attention mask of permutation language modelling,
// one pass over the sessions. The draws are those of t4r_fast/plain/mask_permutation.py, bit
// for bit.

#include <algorithm>
#include <optional>
#include <vector>

#include "seed.h"
#include "sequence_mask.h"

namespace t4r_fast {
namespace {

constexpr const char* kOp = "mask_permutation";

enum Mode : int64_t { kTrain, kLast, kNext };
enum Draw : uint32_t { kSpan = 4, kPick = 5, kOrder = 6 };

// One span in each stretch of the session's n items.
int64_t mark_spans(bool* mask, int64_t n, uint32_t session, const Seed& seed,
                   const std::vector<int64_t>& contexts) {
  int64_t masked = 0;
  uint32_t step = 0;
  for (int64_t current = 0; current < n; ++step) {
    const Words words = philox(seed.key, seed.counter(step, session, kSpan));
    const int64_t drawn = below(words.w[0], static_cast<int64_t>(contexts.size()));
    const int64_t span = drawn + 1, context = contexts[drawn];
    const int64_t start = current + below(words.w[1], context - span + 1);
    const int64_t stop = std::min(start + span, n);
    for (int64_t l = start; l < stop; ++l) {  // stretches do not overlap
      mask[l] = true;
      ++masked;
    }
    current += context;
  }
  return masked;
}

// Marks what is predicted; order[l] is 0 for the rest, and else where l comes in the random order.
void train(bool* mask, uint64_t* order, int64_t n, int64_t positions, uint32_t session,
           const Seed& seed, const std::vector<int64_t>& contexts, bool permute_all) {
  std::fill_n(order, positions, uint64_t{0});
  if (n == 0) return;
  int64_t masked = n;
  if (permute_all) {
    std::fill_n(mask, n, true);
  } else {
    masked = mark_spans(mask, n, session, seed, contexts);
  }
  const Words pick = philox(seed.key, seed.counter(0, session, kPick));
  if (masked == 0) {
    mask[below(pick.w[0], n)] = true;
    masked = 1;
  }
  if (masked == n) mask[below(pick.w[1], n)] = false;
  for (int64_t l = 0; l < n; l += 4) {
    const Words words =
        philox(seed.key, seed.counter(static_cast<uint32_t>(l / 4), session, kOrder));
    for (int64_t lane = 0; lane < std::min<int64_t>(4, n - l); ++lane) {
      const uint64_t at = static_cast<uint64_t>(l + lane);
      // equal words: by position
      if (mask[at]) order[at] = words.w[lane] * static_cast<uint64_t>(positions) + at + 1;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mask_permutation_fwd_cpu(
    const Tensor& item_ids, const std::optional<Tensor>& seed, std::vector<int64_t> contexts,
    bool permute_all, int64_t mode, int64_t padding_idx) {
  const Sessions sessions(kOp, item_ids, padding_idx);
  CHECK(mode >= kTrain && mode <= kNext, kOp, ": mode must be 0 to 2; got ", mode);
  CHECK(mode != kTrain || seed.has_value(), kOp, ": seed must be given in mode 'train'");
  CHECK(!contexts.empty(), kOp, ": max_span_length must be >= 1");
  for (size_t i = 0; i < contexts.size(); ++i) {
    CHECK(contexts[i] > static_cast<int64_t>(i), kOp, ": a stretch must hold its span; got ",
          contexts[i], " for a span of ", i + 1);
  }
  const Seed drawn = mode == kTrain ? read_seed(kOp, *seed) : Seed{};
  const int64_t positions = sessions.positions + (mode == kNext);
  MaskOutputs out(item_ids, sessions.count, positions);
  Tensor perm_mask =
      torch::stable::new_empty(item_ids, {sessions.count, positions, positions}, ScalarType::Float);
  Tensor identity = torch::stable::new_empty(item_ids, {positions, positions}, ScalarType::Float);
  float* diagonal = identity.mutable_data_ptr<float>();
  for (int64_t i = 0; i < positions * positions; ++i) diagonal[i] = i % (positions + 1) == 0;
  int64_t* targets = out.targets.mutable_data_ptr<int64_t>();
  bool* masks = out.mask.mutable_data_ptr<bool>();
  float* hidden = perm_mask.mutable_data_ptr<float>();

  // A session writes L^2 numbers: some microseconds.
  torch::stable::parallel_for(0, sessions.count, 32, [&](int64_t b, int64_t stop) {
    std::vector<uint64_t> order(static_cast<size_t>(positions));
    for (; b < stop; ++b) {
      int64_t* target = targets + b * positions;
      bool* mask = masks + b * positions;
      const int64_t* const items = sessions.row(b);
      const int64_t n = sessions.length(b);
      std::fill_n(mask, positions, false);
      if (mode == kTrain) {
        train(mask, order.data(), n, positions, static_cast<uint32_t>(b), drawn, contexts,
              permute_all);
      } else if (mode == kNext) {
        mask[n] = true;
      } else if (n > 0) {
        mask[n - 1] = true;
      }
      for (int64_t l = 0; l < positions; ++l) {
        target[l] = mask[l] && mode != kNext ? items[l] : padding_idx;
      }
      for (int64_t i = 0; i < positions; ++i) {
        float* row = hidden + (b * positions + i) * positions;
        for (int64_t j = 0; j < positions; ++j) {
          row[j] = mode == kTrain ? mask[j] && order[i] <= order[j] : mask[j] || j > i;
        }
      }
    }
  });
  sessions.check_padding(kOp);
  auto [rows_targets, rows_mask, rows, count] =
      out.list_rows([masks](int64_t i) { return masks[i]; });
  return {rows_targets, rows_mask, rows, count, perm_mask, identity};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("mask_permutation_fwd", TORCH_BOX(&t4r_fast::mask_permutation_fwd_cpu));
}
