// target_rank: one pass over the items that counts, per row, those scored above and equal to the
// target. A thread counts its range of items; integers add in any order. The log-sum-exp of a row
// is that of fixed parts of the items, merged in their order: its bits depend neither on the number
// of threads nor on the other rows.
#include "target_rank.h"

#include <cmath>
#include <limits>
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

// Of the items, for the sums. More threads than parts have nothing to do.
constexpr int64_t kParts = 64;

template <typename T>
struct Ranks {
  int64_t *above, *before, *after;
  T *score, *lse;  // or null
  double temperature;
};

// Of one row, from the sums of parts.
template <typename T>
double log_sum_exp(int64_t parts, int64_t apart, const T* top, const double* total) {
  T highest = std::numeric_limits<T>::lowest();
  for (int64_t p = 0; p < parts; ++p) highest = std::max(highest, top[p * apart]);
  double sum = 0;
  for (int64_t p = 0; p < parts; ++p) {
    sum += total[p * apart] * std::exp(static_cast<double>(top[p * apart]) - highest);
  }
  return highest + std::log(sum);
}

template <typename T>
void rank_chunk(const Scores& scores, const Kept& kept, int64_t first, int64_t count,
                const Ranks<T>& out) {
  const Packed<T> packed(count, scores.table.width, kernels<T>().lanes);
  kernels<T>().pack(scores.hidden, kept.source.data() + first, packed.view);
  const bool sums = out.lse != nullptr;
  const int64_t threads = std::min(scores.threads(count), sums ? kParts : scores.tiles);
  const int64_t parts = sums ? std::min(kParts, scores.tiles) : threads;
  const int64_t lane_rows = packed.lane_rows;
  const Buffer<T> own(lane_rows), top(sums ? parts * lane_rows : 0);
  const Buffer<double> total(sums ? parts * lane_rows : 0);
  const Buffer<int64_t> counts(threads * 3 * count);
  std::fill_n(own.data(), lane_rows, T(0));
  std::fill_n(counts.data(), threads * 3 * count, int64_t{0});
  const T inverse_temperature = static_cast<T>(1 / out.temperature);
  const auto scan_of = [&](int64_t thread, int64_t part) {
    int64_t* const above = counts.data() + thread * 3 * count;
    return RankScan<T>{scores.table,
                       packed.view,
                       kept.target.data() + first,
                       own.data(),
                       inverse_temperature,
                       above,
                       above + count,
                       above + 2 * count,
                       sums ? top.data() + part * lane_rows : nullptr,
                       sums ? total.data() + part * lane_rows : nullptr};
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t stop) {
    const Buffer<T> scratch(rank_scratch<T>(packed.view.padded));
    for (; thread < stop; ++thread) {
      kernels<T>().score_targets(scan_of(thread, 0), count * thread / threads,
                                 count * (thread + 1) / threads, scratch.data());
    }
  });
  split_tiles(parts, threads, [&](int64_t thread, int64_t part, int64_t stop) {
    const Buffer<T> scratch(rank_scratch<T>(packed.view.padded));
    for (; part < stop; ++part) {
      const RankScan<T> scan = scan_of(thread, part);
      for (int64_t i = 0; sums && i < lane_rows; ++i) {
        // The sum over all items has the target's share, so that nothing far below it counts.
        const T z = own[i] * inverse_temperature, lowest = std::numeric_limits<T>::lowest();
        scan.top[i] = z > lowest ? z : lowest;
        scan.total[i] = 0;
      }
      kernels<T>().scan(scan, scores.tiles * part / parts, scores.tiles * (part + 1) / parts,
                        scratch.data());
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    int64_t found[3] = {};
    for (int64_t t = 0; t < threads; ++t) {
      for (int64_t j = 0; j < 3; ++j) found[j] += counts[(t * 3 + j) * count + i];
    }
    const bool nan = std::isnan(own[i]);
    const int64_t slot = kept.slot[first + i];
    out.above[slot] = found[0] - nan;  // the target itself
    out.before[slot] = found[2];
    out.after[slot] = found[1] - found[2] - !nan;  // the target ties with itself
    if (!sums) continue;
    out.score[slot] = own[i] * inverse_temperature;
    out.lse[slot] = static_cast<T>(log_sum_exp(parts, lane_rows, top.data() + i, total.data() + i));
  }
}

template <typename T>
void rank(const Scores& scores, const Kept& kept, const Ranks<T>& out) {
  const int64_t padded = round_up(scores.table.width, kernels<T>().lanes);
  const int64_t sums = out.lse ? kParts * static_cast<int64_t>(sizeof(T) + sizeof(double)) : 0;
  const int64_t row_bytes = 2 * padded * static_cast<int64_t>(sizeof(T)) + sums +
                            scores.threads(kept.count) * 3 * static_cast<int64_t>(sizeof(int64_t));
  const int64_t step = rows_per_chunk(kept.count, row_bytes, kPanel<T>);
  for (int64_t first = 0, count; first < kept.count; first += count) {
    count = std::min(step, kept.count - first);
    rank_chunk<T>(scores, kept, first, count, out);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> target_rank_fwd_cpu(
    const Tensor& hidden, const Tensor& items, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& rows, double temperature,
    int64_t ignore_index, bool need_lse) {
  CHECK(temperature > 0, kOp, ": temperature must be > 0; got ", temperature);
  const Scores scores(kOp, hidden, items, bias);
  const Kept kept(kOp, scores, rows, &target, ignore_index);
  const auto filled = [&](double value) {
    Tensor out = torch::stable::new_empty(target, {kept.size});
    return torch::stable::fill_(out, value);
  };
  Tensor above = filled(-1), before = filled(0), after = filled(0);
  const ScalarType type = scores.is_double() ? ScalarType::Double : ScalarType::Float;
  const int64_t size = need_lse ? kept.size : 0;
  Tensor score = torch::stable::new_zeros(hidden, {size}, type);
  Tensor lse = torch::stable::new_zeros(hidden, {size}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    rank<T>(scores, kept,
            {above.mutable_data_ptr<int64_t>(), before.mutable_data_ptr<int64_t>(),
             after.mutable_data_ptr<int64_t>(),
             need_lse ? score.template mutable_data_ptr<T>() : nullptr,
             need_lse ? lse.template mutable_data_ptr<T>() : nullptr, temperature});
  };
  scores.is_double() ? run(0.0) : run(0.0f);
  return {above, before, after, score, lse};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("target_rank_fwd", TORCH_BOX(&t4r_fast::target_rank_fwd_cpu));
}
