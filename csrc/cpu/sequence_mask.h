// What mask_mlm and mask_causal share: reading sessions, the outputs, and the list of rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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
    data = item_ids.const_data_ptr<int64_t>();
    count = item_ids.size(0);
    positions = item_ids.size(1);
    stride_b = item_ids.stride(0);
    stride_l = item_ids.stride(1);
  }

  int64_t item(int64_t b, int64_t l) const { return data[b * stride_b + l * stride_l]; }

  int64_t length(int64_t b) const {
    int64_t n = 0;
    for (int64_t l = 0; l < positions; ++l) n += item(b, l) != padding_idx;
    return n;
  }

  const int64_t* data;
  int64_t count, positions, stride_b, stride_l, padding_idx;
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
