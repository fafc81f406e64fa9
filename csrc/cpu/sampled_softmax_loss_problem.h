// What forward and backward of sampled_softmax_loss share: arguments, the rows that take part, and
// groups of rows with their candidates. Part of sampled_softmax_loss.cpp.
#pragma once

#include <cstring>
#include <tuple>

#include "float_types.h"
#include "item_rows.h"
#include "negatives.h"
#include "radix_sort.h"
#include "sampled_softmax_loss.h"
#include "seed.h"

namespace t4r_fast {

extern const SampledKernels<float> sampled_softmax_loss_f32_portable, sampled_softmax_loss_f32_avx2,
    sampled_softmax_loss_f32_avx512;
extern const SampledKernels<double> sampled_softmax_loss_f64_portable,
    sampled_softmax_loss_f64_avx2, sampled_softmax_loss_f64_avx512;

namespace {

constexpr const char* kOp = "sampled_softmax_loss";

template <typename T>
const SampledKernels<T>& kernels();
template <>
const SampledKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(sampled_softmax_loss_f32);
}
template <>
const SampledKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(sampled_softmax_loss_f64);
}

// Everything that forward and backward are given.
struct Problem {
  Problem(const Tensor& hidden, const Tensor& items, const Tensor& target,
          const std::optional<Tensor>& bias, const std::optional<Tensor>& rows,
          const std::optional<Tensor>& cumulative, const Tensor& seed, int64_t num_negatives,
          int64_t sampler, int64_t scope, int64_t low, double log_size, bool logq, bool remove_hits,
          double temperature, int64_t ignore_index)
      : scores(kOp, hidden, items, bias),
        kept(kOp, scores, rows, &target, ignore_index),
        named(rows.has_value()) {
    CHECK(num_negatives >= 1, kOp, ": num_negatives must be >= 1; got ", num_negatives);
    CHECK(low >= 0 && low < scores.table.count, kOp, ": low must be 0 <= low < ",
          scores.table.count, "; got ", low);
    CHECK(temperature > 0, kOp, ": temperature must be > 0; got ", temperature);
    CHECK(sampler >= 0 && sampler <= 3 && scope >= 0 && scope <= 2, kOp,
          ": sampler must be 0 to 3 and scope 0 to 2; got ", sampler, " and ", scope);
    negatives = {read_seed(kOp, seed),
                 static_cast<Sampler>(sampler),
                 static_cast<Scope>(scope),
                 num_negatives,
                 scores.table.count,
                 low,
                 log_size,
                 temperature,
                 logq,
                 remove_hits,
                 nullptr};
    CHECK(negatives.sampler != Sampler::kT4rec || negatives.scope == Scope::kBatch, kOp,
          ": sampler 't4rec' must have scope 'batch'");
    if (negatives.sampler == Sampler::kPopularity) {
      CHECK(cumulative.has_value() && cumulative->dim() == 1 &&
                cumulative->size(0) == scores.table.count &&
                cumulative->scalar_type() == ScalarType::Double,
            kOp, ": popularity must have shape (V,), (", scores.table.count, ",)");
      table = torch::stable::contiguous(*cumulative);
      negatives.cumulative = table->const_data_ptr<double>();
    }
  }

  int64_t width() const { return scores.table.width; }
  ScalarType sum_type() const {
    return scores.is_double() ? ScalarType::Double : ScalarType::Float;
  }
  double bias(int64_t id) const {
    const Matrix& b = scores.table.bias;
    if (b.data == nullptr) return 0;
    double value = 0;
    convert(b, id * b.stride, 1, &value);
    return value;
  }
  // exp of what rounding added to a shift; 1 for a bias of -inf
  static double shift_factor(double exact, double rounded) {
    return exact == rounded ? 1 : std::exp(rounded - exact);
  }

  Scores scores;
  Kept kept;
  Negatives negatives;
  bool named;  // by `rows`, so that a row may come twice
  std::optional<Tensor> table;
};

// Rows that share their negatives.
template <typename T>
struct Group {
  Group(const Problem& p, int64_t first, int64_t stop, uint32_t number)
      : first(first),
        count(stop - first),
        drawn(p.negatives, number),
        packed(count, p.width(), kernels<T>().lanes, RowsLie::kWhole),
        shift(drawn.size()),
        factor(drawn.size()),
        hit(count),
        growth(p.negatives.hits_grow() ? count : 0) {
    kernels<T>().pack(p.scores.hidden, p.kept.source.data() + first, packed.view);
    const double per_bias = 1 / p.negatives.temperature;
    for (int64_t i = 0; i < drawn.size(); ++i) {
      const int64_t id = drawn.ids[i];
      const double exact = p.negatives.shift(id, drawn.times[i]) - p.bias(id) * per_bias;
      shift[i] = static_cast<T>(exact);
      factor[i] = static_cast<T>(p.shift_factor(exact, static_cast<double>(shift[i])));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t target = p.kept.target[first + i];
      hit[i] = p.negatives.hits_matter() ? drawn.find(target) : -1;
      if (p.negatives.hits_grow()) {
        growth[i] = hit[i] < 0 ? T(0) : static_cast<T>(p.negatives.hit_growth(target));
      }
    }
  }

  Hits<T> hits(const Problem& p, const int64_t* place) const {
    return {place, p.negatives.hits_grow() ? growth.data() : nullptr,
            static_cast<T>(p.negatives.hit_value())};
  }
  // Candidates [from, to), gathered into `copy`.
  Candidates<T> gather(const Problem& p, int64_t from, int64_t to, const Buffer<T>& copy,
                       bool parallel) const {
    const int64_t padded = packed.view.padded;
    const auto part = [&](int64_t i, int64_t stop) {
      kernels<T>().gather(p.scores.table.items, drawn.ids.data() + from + i, stop - i, p.width(),
                          padded, copy.data() + i * padded);
    };
    if (parallel) {
      torch::stable::parallel_for(0, to - from, 512, part);
    } else {
      part(0, to - from);
    }
    const int64_t rest = round_up(to - from, kTile) - (to - from);
    std::fill_n(copy.data() + (to - from) * padded, rest * padded, T(0));
    return {copy.data(), shift.data() + from, to - from};
  }
  Buffer<T> room(int64_t candidates) const {
    return Buffer<T>(round_up(candidates, kTile) * packed.view.padded);
  }

  int64_t first, count;
  DrawnSet drawn;
  Packed<T> packed;
  Buffer<T> shift, factor;
  std::vector<int64_t> hit;
  Buffer<T> growth;
};

// first row, row after the last, number of the set
struct Range {
  int64_t first, stop;
  uint32_t number;
};

std::vector<Range> ranges(const Problem& p) {
  std::vector<Range> found;
  if (p.negatives.scope == Scope::kBatch) {
    if (p.kept.count > 0) found.push_back({0, p.kept.count, 0});
    return found;
  }
  for (int64_t i = 0; i < p.kept.count; ++i) {
    const uint32_t number = static_cast<uint32_t>(p.kept.slot[i] / kBlockRows);
    if (found.empty() || found.back().number != number) found.push_back({i, i, number});
    found.back().stop = i + 1;
  }
  return found;
}

template <typename T>
struct Forward {
  const Problem& p;
  T* loss;
  double* lse;
  T* unit;  // (M, D) or null

  // Row i of those kept: top and total are of its negatives, mean is total times their mean.
  void finish(int64_t i, T top, double total, const T* mean, const T* hidden, T* copy) const;
  void group(const Range& range, bool parallel) const;
};

template <typename T>
void Forward<T>::finish(int64_t i, T top, double total, const T* mean, const T* hidden,
                        T* copy) const {
  const int64_t target = p.kept.target[i], slot = p.kept.slot[i], width = p.width();
  kernels<T>().gather(p.scores.table.items, &target, 1, width, width, copy);
  double dot = 0;
  for (int64_t k = 0; k < width; ++k) dot += static_cast<double>(hidden[k]) * copy[k];
  const double z =
      (dot + p.bias(target)) / p.negatives.temperature - p.negatives.target_shift(target);
  // softplus of the difference: exact also where the target has nearly all of the weight
  const double negatives = static_cast<double>(top) + std::log(total);
  const double apart = negatives - z;
  const double row_loss =
      apart > 0 ? apart + std::log1p(std::exp(-apart)) : std::log1p(std::exp(apart));
  loss[slot] = static_cast<T>(row_loss);
  lse[slot] = apart > 0 ? negatives + std::log1p(std::exp(-apart)) : z + row_loss;
  if (unit == nullptr) return;
  const double share = -std::expm1(-row_loss) / p.negatives.temperature;
  const double factor = total == 0 ? 0 : share / total;
  T* out = unit + slot * width;
  for (int64_t k = 0; k < width; ++k) {
    out[k] = static_cast<T>(factor * static_cast<double>(mean[k]) -
                            share * static_cast<double>(copy[k]));
  }
}

}  // namespace
}  // namespace t4r_fast
