// item_topk: one pass over the items with a heap of k per row. A thread has its own heaps for its
// range of items; they are merged by score and id, so the answer does not depend on the split.
#include "item_topk.h"

#include <limits>
#include <tuple>

#include "item_rows.h"

// The vector unit comes first.
#include "simd_portable.h"

// and its kernels
#include "item_topk_kernel.h"

namespace t4r_fast {

extern const TopkKernels<float> item_topk_f32_avx2, item_topk_f32_avx512;
extern const TopkKernels<double> item_topk_f64_avx2, item_topk_f64_avx512;

namespace {

constexpr const char* kOp = "item_topk";

const TopkKernels<float> item_topk_f32_portable = topk_kernels<F32>();
const TopkKernels<double> item_topk_f64_portable = topk_kernels<F64>();

template <typename T>
const TopkKernels<T>& kernels();

template <>
const TopkKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(item_topk_f32);
}
template <>
const TopkKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(item_topk_f64);
}

// Sorted ids of each kept row that it must not be given.
struct Excluded {
  Excluded(const Scores& scores, const Kept& kept, const std::optional<Tensor>& exclude) {
    if (!exclude.has_value()) return;
    CHECK(exclude->dim() == 2 && exclude->size(0) == scores.hidden_count, kOp,
          ": exclude must have one row per row of hidden, ", scores.hidden_count);
    CHECK_INT64(kOp, *exclude);
    const int64_t* data = exclude->const_data_ptr<int64_t>();
    const int64_t row_stride = exclude->stride(0), stride = exclude->stride(1);
    start.push_back(0);
    for (const int64_t row : kept.source) {
      for (int64_t i = 0; i < exclude->size(1); ++i) {
        const int64_t item = data[row * row_stride + i * stride];
        CHECK(item < scores.table.count, kOp, ": exclude must be < ", scores.table.count,
              " (the rows of items), or negative to be ignored; got ", item, " at place (", row,
              ", ", i, ")");
        if (item >= 0) items.push_back(item);
      }
      std::sort(items.begin() + start.back(), items.end());
      start.push_back(static_cast<int64_t>(items.size()));
    }
  }
  std::vector<int64_t> items, start;
};

template <typename T>
struct Answers {
  int64_t k;
  double temperature;
  T* scores;     // filled with -inf
  int64_t* ids;  // filled with -1
};

template <typename T>
void topk_chunk(const Scores& scores, const Kept& kept, const Excluded& excluded, int64_t padding,
                int64_t first, int64_t count, const Answers<T>& out) {
  const Packed<T> packed(count, scores.table.width, kernels<T>().lanes);
  kernels<T>().pack(scores.hidden, kept.source.data() + first, packed.view);
  const int64_t threads = scores.threads(count), k = out.k;
  const Buffer<Candidate<T>> best(threads * count * k);
  const Buffer<int64_t> found(threads * count);
  const Buffer<T> threshold(threads * packed.lane_rows);
  std::fill_n(found.data(), threads * count, int64_t{0});
  std::fill_n(threshold.data(), threads * packed.lane_rows, -std::numeric_limits<T>::infinity());
  split_tiles(scores.tiles, threads, [&](int64_t thread, int64_t tile, int64_t stop) {
    TopkScan<T> a;
    a.table = scores.table;
    a.rows = packed.view;
    a.k = k;
    a.excluded = excluded.start.empty() ? nullptr : excluded.items.data();
    a.excluded_start = excluded.start.empty() ? nullptr : excluded.start.data() + first;
    a.padding = padding;
    a.best = best.data() + thread * count * k;
    a.found = found.data() + thread * count;
    a.threshold = threshold.data() + thread * packed.lane_rows;
    const Buffer<T> scratch(topk_scratch<T>(packed.view.padded));
    kernels<T>().scan(a, tile, stop, scratch.data());
  });
  std::vector<Candidate<T>> all;
  for (int64_t i = 0; i < count; ++i) {
    all.clear();
    for (int64_t t = 0; t < threads; ++t) {
      const Candidate<T>* heap = best.data() + (t * count + i) * k;
      all.insert(all.end(), heap, heap + found[t * count + i]);
    }
    std::sort(all.begin(), all.end(),
              [](const Candidate<T>& a, const Candidate<T>& b) { return worse(b, a); });
    const int64_t slot = kept.slot[first + i];
    const int64_t size = std::min(k, static_cast<int64_t>(all.size()));
    for (int64_t j = 0; j < size; ++j) {
      // Dividing last leaves the order, ties included, that of target_rank.
      out.scores[slot * k + j] = static_cast<T>(all[j].score / out.temperature);
      out.ids[slot * k + j] = all[j].item;
    }
  }
}

template <typename T>
void topk(const Scores& scores, const Kept& kept, const Excluded& excluded, int64_t padding,
          const Answers<T>& out) {
  const int64_t padded = round_up(scores.table.width, kernels<T>().lanes);
  const int64_t per_thread = out.k * static_cast<int64_t>(sizeof(Candidate<T>)) + 16;
  const int64_t row_bytes =
      2 * padded * static_cast<int64_t>(sizeof(T)) + scores.threads(kept.count) * per_thread;
  const int64_t step = rows_per_chunk(kept.count, row_bytes, kPanel<T>);
  for (int64_t first = 0; first < kept.count; first += step) {
    topk_chunk<T>(scores, kept, excluded, padding, first, std::min(step, kept.count - first), out);
  }
}

std::tuple<Tensor, Tensor> item_topk_fwd_cpu(const Tensor& hidden, const Tensor& items, int64_t k,
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& rows, double temperature,
                                             const std::optional<Tensor>& exclude,
                                             std::optional<int64_t> padding_idx) {
  CHECK(k >= 1, kOp, ": k must be at least 1; got ", k);
  CHECK(temperature > 0, kOp, ": temperature must be > 0; got ", temperature);
  const Scores scores(kOp, hidden, items, bias);
  const Kept kept(kOp, scores, rows, nullptr, 0);
  const Excluded excluded(scores, kept, exclude);
  const ScalarType type = scores.is_double() ? ScalarType::Double : ScalarType::Float;
  Tensor best = torch::stable::new_empty(hidden, {kept.size, k}, type);
  Tensor ids = torch::stable::new_empty(hidden, {kept.size, k}, ScalarType::Long);
  torch::stable::fill_(best, -std::numeric_limits<double>::infinity());
  torch::stable::fill_(ids, -1);
  int64_t* const id = ids.mutable_data_ptr<int64_t>();
  const int64_t padding = padding_idx.value_or(-1);
  if (scores.is_double()) {
    const Answers<double> out{k, temperature, best.mutable_data_ptr<double>(), id};
    topk<double>(scores, kept, excluded, padding, out);
  } else {
    const Answers<float> out{k, temperature, best.mutable_data_ptr<float>(), id};
    topk<float>(scores, kept, excluded, padding, out);
  }
  return {best, ids};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("item_topk_fwd", TORCH_BOX(&t4r_fast::item_topk_fwd_cpu));
}
