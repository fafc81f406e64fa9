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
