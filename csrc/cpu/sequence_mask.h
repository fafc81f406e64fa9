// What the mask ops share: reading sessions, the outputs, and the list of rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <tuple>

#include "../check.h"

namespace t4r_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A session per work item is some 100 ns: threads pay from a few hundred sessions on.
constexpr int64_t kSessionsPerThread = 512;

struct Sessions {
  Sessions(const char* op, const Tensor& item_ids, int64_t padding_idx) : padding_idx(padding_idx) {
    CHECK_DIM(op, item_ids, 2, "(B, L)");
    CHECK_INT64(op, item_ids);
    tensor = item_ids.stride(1) == 1 ? item_ids : torch::stable::contiguous(item_ids);
    data = tensor.const_data_ptr<int64_t>();
    count = tensor.size(0);
    positions = tensor.size(1);
    stride = tensor.stride(0);
  }

  const int64_t* row(int64_t b) const { return data + b * stride; }

  // The number of items. An item behind padding is noted: check_padding then refuses the call, for
  // an exception of a work item would lose its message on the way through parallel_for.
  int64_t length(int64_t b) const {
    const int64_t* const items = row(b);
    int64_t n = 0, end = 0;
    for (int64_t l = 0; l < positions; ++l) {
      const bool is_item = items[l] != padding_idx;
      n += is_item;
      end = is_item ? l + 1 : end;
    }
    if (__builtin_expect(n != end, 0)) wrong.store(true, std::memory_order_relaxed);
    return n;
  }

  // Called when all lengths have been taken.
  void check_padding(const char* op) const {
    if (!wrong.load(std::memory_order_relaxed)) return;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t* const items = row(b);
      for (int64_t l = 1; l < positions; ++l) {
        CHECK(items[l] == padding_idx || items[l - 1] != padding_idx, op,
              ": item_ids must have its padding (", padding_idx,
              ") on the right only; got an item after padding in row ", b, ", position ", l);
      }
    }
  }

  Tensor tensor;  // a copy where the ids of a session do not lie side by side
  const int64_t* data;
  int64_t count, positions, stride, padding_idx;
  mutable std::atomic<bool> wrong{false};
};

// B sessions one after the other; their items end at `end`, before the capacity `size`.
struct PackedSessions {
  PackedSessions(const char* op, const Tensor& item_ids, const Tensor& offsets,
                 int64_t padding_idx) {
    CHECK_DIM(op, item_ids, 1, "(U,)");
    CHECK_INT64(op, item_ids);
    CHECK_DIM(op, offsets, 1, "(B + 1,)");
    CHECK_INT64(op, offsets);
    CHECK(offsets.size(0) > 0, op, ": offsets must have shape (B + 1,), one entry at least");
    ids = torch::stable::contiguous(item_ids);
    starts = torch::stable::contiguous(offsets);
    items = ids.const_data_ptr<int64_t>();
    start = starts.const_data_ptr<int64_t>();
    count = offsets.size(0) - 1;
    size = item_ids.size(0);
    for (int64_t b = 0; b <= count; ++b) {
      CHECK(start[b] >= (b == 0 ? 0 : start[b - 1]) && start[b] <= (b == 0 ? 0 : size), op,
            ": offsets must rise from 0 to at most ", size, ", the items that there are; got ",
            start[b], " at entry ", b);
    }
    end = start[count];
    bool padding = false;
    for (int64_t i = 0; i < end; ++i) padding |= items[i] == padding_idx;
    for (int64_t i = 0; padding && i < end; ++i) {
      CHECK(items[i] != padding_idx, op, ": item_ids with offsets must hold no padding (",
            padding_idx, "); got it at item ", i);
    }
  }

  int64_t length(int64_t b) const { return start[b + 1] - start[b]; }

  Tensor ids, starts;
  const int64_t *items, *start;
  int64_t count, size, end;
};

struct PackedOutputs {
  explicit PackedOutputs(const PackedSessions& sessions)
      : replaced(torch::stable::new_empty(sessions.ids, {sessions.size}, ScalarType::Bool)),
        rows(torch::stable::new_empty(sessions.ids, {sessions.size})),
        targets(torch::stable::new_empty(sessions.ids, {sessions.size})),
        count(torch::stable::new_empty(sessions.ids, {})) {
    bool* data = replaced.mutable_data_ptr<bool>();
    for (int64_t i = sessions.end; i < sessions.size; ++i) data[i] = false;
  }

  // `found` rows are written: what is left, and the targets, each `ahead` items behind its row.
  // Nothing is predicted with `ahead` < 0.
  std::tuple<Tensor, Tensor, Tensor, Tensor> finish(const PackedSessions& sessions, int64_t found,
                                                    int64_t ahead, int64_t padding_idx) {
    int64_t *row = rows.mutable_data_ptr<int64_t>(), *target = targets.mutable_data_ptr<int64_t>();
    const int64_t labelled = ahead < 0 ? 0 : found;
    for (int64_t k = 0; k < labelled; ++k) target[k] = sessions.items[row[k] + ahead];
    for (int64_t k = labelled; k < sessions.size; ++k) target[k] = padding_idx;
    for (int64_t k = found; k < sessions.size; ++k) row[k] = -1;
    *count.mutable_data_ptr<int64_t>() = found;
    return {replaced, rows, targets, count};
  }

  Tensor replaced, rows, targets, count;
};

struct MaskOutputs {
  MaskOutputs(const Tensor& like, int64_t sessions, int64_t positions)
      : targets(torch::stable::new_empty(like, {sessions, positions})),
        mask(torch::stable::new_empty(like, {sessions, positions}, ScalarType::Bool)),
        rows(torch::stable::new_empty(like, {sessions * positions})),
        count(torch::stable::new_empty(like, {})) {}

  // Flat positions for which chosen(i) holds, in order, then -1.
  template <typename Chosen>
  std::tuple<Tensor, Tensor, Tensor, Tensor> list_rows(Chosen chosen) {
    int64_t* out = rows.mutable_data_ptr<int64_t>();
    const int64_t size = rows.numel();
    int64_t found = 0;
    for (int64_t i = 0; i < size; ++i) {
      out[found] = i;  // found <= i: in bounds; overwritten unless i is chosen
      found += chosen(i);
    }
    for (int64_t i = found; i < size; ++i) out[i] = -1;
    *count.mutable_data_ptr<int64_t>() = found;
    return {targets, mask, rows, count};
  }

  Tensor targets, mask, rows, count;
};

}  // namespace t4r_fast
