// target_rank: one pass over the items that counts, per row, those scored above and equal to the
// target. A thread counts its range of items; integers add in any order.
#include "target_rank.h"

#include <cmath>
#include <tuple>

#include "item_rows.h"

// The vector unit comes first.
#include "simd_portable.h"

// and its kernels
#include "target_rank_kernel.h"

namespace t4r_fast {

extern const RankKernels<float> target_rank_f32_avx2, target_rank_f32_avx512;
extern const RankKernels<double> target_rank_f64_avx2, target_rank_f64_avx512;

namespace {

constexpr const char* kOp = "target_rank";

const RankKernels<float> target_rank_f32_portable = rank_kernels<F32>();
const RankKernels<double> target_rank_f64_portable = rank_kernels<F64>();

template <typename T>
const RankKernels<T>& kernels();

template <>
const RankKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(target_rank_f32);
}
template <>
const RankKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(target_rank_f64);
}

struct Counts {
  int64_t *above, *before, *after;
};

template <typename T>
void rank_chunk(const Scores& scores, const Kept& kept, int64_t first, int64_t count,
                const Counts& out) {
  const Packed<T> packed(count, scores.table.width, kernels<T>().lanes);
  kernels<T>().pack(scores.hidden, kept.source.data() + first, packed.view);
  const int64_t threads = scores.threads(count);
  const Buffer<T> own(packed.lane_rows);
  const Buffer<int64_t> counts(threads * 3 * count);
  std::fill_n(own.data(), packed.lane_rows, T(0));
  std::fill_n(counts.data(), threads * 3 * count, int64_t{0});
  const auto scan_of = [&](int64_t thread) {
    int64_t* const part = counts.data() + thread * 3 * count;
    return RankScan<T>{scores.table, packed.view,     kept.target.data() + first, own.data(), part,
                       part + count, part + 2 * count};
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t stop) {
    const Buffer<T> scratch(rank_scratch<T>(packed.view.padded));
    for (; thread < stop; ++thread) {
      kernels<T>().score_targets(scan_of(thread), count * thread / threads,
                                 count * (thread + 1) / threads, scratch.data());
    }
  });
  split_tiles(scores.tiles, threads, [&](int64_t thread, int64_t tile, int64_t stop) {
    const Buffer<T> scratch(rank_scratch<T>(packed.view.padded));
    kernels<T>().scan(scan_of(thread), tile, stop, scratch.data());
  });
  for (int64_t i = 0; i < count; ++i) {
    int64_t sums[3] = {};
    for (int64_t t = 0; t < threads; ++t) {
      for (int64_t j = 0; j < 3; ++j) sums[j] += counts[(t * 3 + j) * count + i];
    }
    const bool nan = std::isnan(own[i]);
    const int64_t slot = kept.slot[first + i];
    out.above[slot] = sums[0] - nan;  // the target itself
    out.before[slot] = sums[2];
    out.after[slot] = sums[1] - sums[2] - !nan;  // the target ties with itself
  }
}

template <typename T>
void rank(const Scores& scores, const Kept& kept, const Counts& out) {
  const int64_t padded = round_up(scores.table.width, kernels<T>().lanes);
  const int64_t row_bytes = 2 * padded * static_cast<int64_t>(sizeof(T)) +
                            scores.threads(kept.count) * 3 * static_cast<int64_t>(sizeof(int64_t));
  const int64_t step = rows_per_chunk(kept.count, row_bytes, kPanel<T>);
  for (int64_t first = 0; first < kept.count; first += step) {
    rank_chunk<T>(scores, kept, first, std::min(step, kept.count - first), out);
  }
}

std::tuple<Tensor, Tensor, Tensor> target_rank_fwd_cpu(const Tensor& hidden, const Tensor& items,
                                                       const Tensor& target,
                                                       const std::optional<Tensor>& bias,
                                                       const std::optional<Tensor>& rows,
                                                       int64_t ignore_index) {
  const Scores scores(kOp, hidden, items, bias);
  const Kept kept(kOp, scores, rows, &target, ignore_index);
  const auto filled = [&](double value) {
    Tensor out = torch::stable::new_empty(target, {kept.size});
    return torch::stable::fill_(out, value);
  };
  Tensor above = filled(-1), before = filled(0), after = filled(0);
  const Counts out{above.mutable_data_ptr<int64_t>(), before.mutable_data_ptr<int64_t>(),
                   after.mutable_data_ptr<int64_t>()};
  if (scores.is_double()) {
    rank<double>(scores, kept, out);
  } else {
    rank<float>(scores, kept, out);
  }
  return {above, before, after};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("target_rank_fwd", TORCH_BOX(&t4r_fast::target_rank_fwd_cpu));
}
