// tied_softmax_loss: cross-entropy over all items without the N x V logits.
// Forward finds the log-sum-exp of every row in one pass over the items. Backward makes the scores
// of a tile of items once more and uses them for both gradients while they are in the cache:
// 2 NVD and 6 NVD operations. A tile belongs to one thread, which writes its ditems once; each
// thread has its own sum for dhidden, added in order. No atomics: the bits depend on the number of
// threads only.
#include "tied_softmax_loss.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "item_rows.h"

// The vector unit comes first.
#include "simd_portable.h"

// and its kernels
#include "tied_softmax_loss_kernel.h"

namespace t4r_fast {

extern const LossKernels<float> tied_softmax_loss_f32_avx2, tied_softmax_loss_f32_avx512;
extern const LossKernels<double> tied_softmax_loss_f64_avx2, tied_softmax_loss_f64_avx512;

namespace {

constexpr const char* kOp = "tied_softmax_loss";

const LossKernels<float> tied_softmax_loss_f32_portable = loss_kernels<F32>();
const LossKernels<double> tied_softmax_loss_f64_portable = loss_kernels<F64>();

template <typename T>
const LossKernels<T>& kernels();

template <>
const LossKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(tied_softmax_loss_f32);
}
template <>
const LossKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(tied_softmax_loss_f64);
}

struct Options {
  Options(double temperature, double softcap, double label_smoothing, double z_loss)
      : temperature(temperature), softcap(softcap), smoothing(label_smoothing), z_loss(z_loss) {
    CHECK(temperature > 0, kOp, ": temperature must be > 0; got ", temperature);
    CHECK(softcap >= 0, kOp, ": softcap must be >= 0 (0 is off); got ", softcap);
  }
  double temperature, softcap, smoothing, z_loss;
};

// The rows [first, first + count) of those that take part, packed, and their targets in the order
// in which the kernels meet them.
template <typename T>
struct Chunk {
  Chunk(const Scores& scores, const Kept& kept, int64_t first, int64_t count)
      : packed(count, scores.table.width, kernels<T>().lanes), targets(count) {
    kernels<T>().pack(scores.hidden, kept.source.data() + first, packed.view);
    for (int64_t i = 0; i < count; ++i) targets[i] = {kept.target[first + i], i};
    std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
      const int64_t left = a.item / kTile, right = b.item / kTile;
      return left != right ? left < right : a.row < b.row;
    });
  }
  Packed<T> packed;
  std::vector<Target> targets;
};

// The tensor that holds scores from forward to backward, (R, stash_items). What fits is a function
// of sizes and of the rows that take part, the same in both passes.
template <typename T>
Stash<T> stash_in(const Tensor& tensor, const Scores& scores, const Kept& kept) {
  Stash<T> stash;
  CHECK(tensor.dim() == 2 && tensor.size(0) == kept.size && tensor.is_contiguous() &&
            tensor.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
        kOp, ": stash must be what forward gave");
  stash.rows = round_up(kept.count, kernels<T>().lanes);
  stash.of = scores.tiles;
  if (kept.count == 0 || tensor.size(1) == 0) return stash;
  stash.data = static_cast<T*>(tensor.mutable_data_ptr());
  stash.tiles = std::min(scores.tiles, tensor.numel() / (kTile * stash.rows));
  return stash;
}

// ---- forward

template <typename T>
void forward_chunk(const Scores& scores, const Kept& kept, const Options& options, int64_t first,
                   int64_t count, Stash<T> stash, T* loss, double* lse, T* mean) {
  stash.first = first;
  const Chunk<T> chunk(scores, kept, first, count);
  const int64_t lane_rows = chunk.packed.lane_rows, threads = scores.threads(count);
  const Buffer<T> top(threads * lane_rows);
  const Buffer<double> total(threads * lane_rows), z_sum(threads * lane_rows);
  const Buffer<double> target_score(count);
  const int64_t padded = chunk.packed.padded, width = scores.table.width;
  const Buffer<T> means(mean ? threads * count * padded : 0), item(mean ? width : 0);
  split_tiles(scores.tiles, threads, [&](int64_t thread, int64_t tile, int64_t stop) {
    LossForward<T> a;
    a.table = scores.table;
    a.rows = chunk.packed.view;
    a.targets = chunk.targets.data();
    a.inverse_temperature = static_cast<T>(1 / options.temperature);
    a.softcap = static_cast<T>(options.softcap);
    a.stash = stash;
    a.top = top.data() + thread * lane_rows;
    a.total = total.data() + thread * lane_rows;
    a.z_sum = options.smoothing != 0 ? z_sum.data() + thread * lane_rows : nullptr;
    a.target_score = target_score.data();
    a.mean = mean ? means.data() + thread * count * padded : nullptr;
    if (mean) std::fill_n(a.mean, count * padded, T(0));
    std::fill_n(a.top, lane_rows, std::numeric_limits<T>::lowest());
    std::fill_n(a.total, lane_rows, 0.0);
    std::fill_n(z_sum.data() + thread * lane_rows, lane_rows, 0.0);
    const Buffer<T> scratch(loss_scratch<T>(a.rows.padded));
    kernels<T>().forward(a, tile, stop, scratch.data());
  });
  for (int64_t i = 0; i < count; ++i) {
    T highest = std::numeric_limits<T>::lowest();
    for (int64_t t = 0; t < threads; ++t) highest = std::max(highest, top[t * lane_rows + i]);
    double sum = 0, z_total = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const double apart = static_cast<double>(top[t * lane_rows + i]) - highest;
      sum += total[t * lane_rows + i] * std::exp(apart);
      z_total += z_sum[t * lane_rows + i];
    }
    // Not through lse: near 0 the loss is far more exact than lse.
    const double log_sum = std::log(sum);
    const double row_lse = highest + log_sum;
    double row_loss = log_sum - (target_score[i] - highest);
    if (options.smoothing != 0) {
      const double mean = z_total / static_cast<double>(scores.table.count);
      row_loss =
          (1 - options.smoothing) * row_loss + options.smoothing * (log_sum - (mean - highest));
    }
    row_loss += options.z_loss != 0 ? options.z_loss * row_lse * row_lse : 0;
    const int64_t slot = kept.slot[first + i];
    loss[slot] = static_cast<T>(row_loss);
    lse[slot] = row_lse;
    if (mean == nullptr) continue;
    // The target's share of the mean less 1, exact also where it has nearly all of the weight.
    const double capped = options.softcap != 0 ? target_score[i] / options.softcap : 0;
    const double of_target =
        std::expm1(target_score[i] - highest - log_sum) * (1 - capped * capped);
    convert(scores.table.items, kept.target[first + i] * scores.table.items.stride, width,
            item.data());
    for (int64_t k = 0; k < width; ++k) {
      double of_all = of_target * static_cast<double>(item[k]);
      for (int64_t t = 0; t < threads; ++t) {
        const double apart = static_cast<double>(top[t * lane_rows + i]) - highest;
        of_all += std::exp(apart) / sum * static_cast<double>(means[(t * count + i) * padded + k]);
      }
      mean[slot * width + k] = static_cast<T>(of_all);
    }
  }
}

template <typename T>
void forward(const Scores& scores, const Kept& kept, const Options& options, const Tensor& stash,
             Tensor& loss, double* lse, Tensor& mean) {
  const int64_t lanes = kernels<T>().lanes, padded = round_up(scores.table.width, lanes);
  const int64_t threads = scores.threads(kept.count);
  const bool need_mean = mean.size(0) > 0;
  const int64_t row_bytes =
      (2 + (need_mean ? threads : 0)) * padded * sizeof(T) + threads * (sizeof(T) + 16);
  const int64_t step = rows_per_chunk(kept.count, row_bytes, kBlock<T>);
  for (int64_t first = 0; first < kept.count; first += step) {
    forward_chunk<T>(scores, kept, options, first, std::min(step, kept.count - first),
                     stash_in<T>(stash, scores, kept), loss.mutable_data_ptr<T>(), lse,
                     need_mean ? mean.mutable_data_ptr<T>() : nullptr);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tied_softmax_loss_fwd_cpu(
    const Tensor& hidden, const Tensor& items, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& rows, double temperature,
    double softcap, double label_smoothing, double z_loss, int64_t ignore_index,
    int64_t stash_items, bool need_mean) {
  CHECK(stash_items >= 0, kOp, ": stash_items must be >= 0; got ", stash_items);
  CHECK(!need_mean || label_smoothing == 0, kOp,
        ": need_mean must be false with label_smoothing: it gives all items a weight");
  const Scores scores(kOp, hidden, items, bias);
  const Options options(temperature, softcap, label_smoothing, z_loss);
  const Kept kept(kOp, scores, rows, &target, ignore_index);
  const ScalarType type = scores.is_double() ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_zeros(hidden, {kept.size}, type);
  Tensor lse = torch::stable::new_zeros(hidden, {kept.size}, ScalarType::Double);
  Tensor stash = torch::stable::new_empty(loss, {kept.size, stash_items});
  use_huge_pages(stash);
  Tensor mean = torch::stable::new_zeros(loss, {need_mean ? kept.size : 0, hidden.size(1)});
  double* lse_data = lse.mutable_data_ptr<double>();
  if (scores.is_double()) {
    forward<double>(scores, kept, options, stash, loss, lse_data, mean);
  } else {
    forward<float>(scores, kept, options, stash, loss, lse_data, mean);
  }
  return {loss, lse, stash, mean};
}

// ---- backward

// Gradients of the outputs, one-dimensional with any stride: autograd expands a scalar with 0.
template <typename T>
struct Values {
  Values(const char* name, const Tensor& tensor, int64_t count)
      : data(tensor.const_data_ptr<T>()), stride(count > 0 ? tensor.stride(0) : 0) {
    CHECK(tensor.dim() == 1 && tensor.size(0) == count, kOp, ": ", name, " must have shape (",
          count, ",)");
  }
  double operator[](int64_t i) const { return static_cast<double>(data[i * stride]); }
  const T* data;
  int64_t stride;
};

struct Outputs {
  Tensor dhidden, ditems, dbias;
  bool need_hidden, need_items, need_bias;
};

template <typename T>
struct Backward {
  const Scores& scores;
  const Kept& kept;
  const Options& options;
  Values<T> dloss, dlse;
  Values<double> lse;
  Stash<T> stash;
  T* dhidden;  // (N, D), added to; or null
  void* ditems;
  T* dbias;

  void run(int64_t first, int64_t count, bool want_hidden, bool want_items, bool add) const;
  void rows_from(const Tensor& mean) const;
  void add_rows(const Buffer<T>& drows, int64_t first, int64_t count, int64_t padded,
                int64_t threads) const;
};

template <typename T>
void Backward<T>::run(int64_t first, int64_t count, bool want_hidden, bool want_items,
                      bool add) const {
  const Chunk<T> chunk(scores, kept, first, count);
  const int64_t lane_rows = chunk.packed.lane_rows, padded = chunk.packed.view.padded;
  const int64_t threads = scores.threads(count);
  const Buffer<T> shift(lane_rows), weight(lane_rows), constant(lane_rows), share(lane_rows);
  for (int64_t i = 0; i < lane_rows; ++i) {
    shift[i] = std::numeric_limits<T>::infinity();
    weight[i] = constant[i] = share[i] = 0;
    if (i >= count) continue;
    const int64_t slot = kept.slot[first + i];
    // every logit's gradient has the factor 1 / temperature
    const double of_loss = dloss[slot] / options.temperature;
    const double of_lse = dlse[slot] / options.temperature;
    shift[i] = static_cast<T>(lse[slot]);
    // What rounding took from lse: at |lse| = 1e4 it is 1e-3 of every probability.
    const double rest = lse[slot] - static_cast<double>(shift[i]);
    const double factor = of_loss * (1 + 2 * options.z_loss * lse[slot]) + of_lse;
    weight[i] = static_cast<T>(rest == 0 ? factor : factor * std::exp(-rest));
    constant[i] =
        static_cast<T>(-of_loss * options.smoothing / static_cast<double>(scores.table.count));
    share[i] = static_cast<T>(of_loss * (options.smoothing - 1));
  }
  const Buffer<T> drows(want_hidden ? threads * count * padded : 0);
  split_tiles(scores.tiles, threads, [&](int64_t thread, int64_t tile, int64_t stop) {
    LossBackward<T> a;
    a.table = scores.table;
    a.rows = chunk.packed.view;
    a.targets = chunk.targets.data();
    a.inverse_temperature = static_cast<T>(1 / options.temperature);
    a.softcap = static_cast<T>(options.softcap);
    a.stash = stash;
    a.stash.first = first;
    a.shift = shift.data();
    a.weight = weight.data();
    a.constant = constant.data();
    a.share = share.data();
    a.drows = want_hidden ? drows.data() + thread * count * padded : nullptr;
    a.ditems = want_items ? ditems : nullptr;
    a.dbias = want_items ? dbias : nullptr;
    a.add = add;
    if (want_hidden) std::fill_n(a.drows, count * padded, T(0));
    const Buffer<T> scratch(loss_scratch<T>(padded));
    kernels<T>().backward(a, tile, stop, scratch.data());
  });
  if (want_hidden) add_rows(drows, first, count, padded, threads);
}

template <typename T>
void Backward<T>::add_rows(const Buffer<T>& drows, int64_t first, int64_t count, int64_t padded,
                           int64_t threads) const {
  for (int64_t i = 0; i < count; ++i) {  // in order: a row may be named twice
    T* out = dhidden + kept.source[first + i] * scores.table.width;
    for (int64_t k = 0; k < scores.table.width; ++k) {
      T sum = 0;
      for (int64_t t = 0; t < threads; ++t) sum += drows[(t * count + i) * padded + k];
      out[k] += sum;
    }
  }
}

// dhidden from what forward kept: the mean of the items under a row's softmax less its target.
template <typename T>
void Backward<T>::rows_from(const Tensor& mean) const {
  const ItemTable& table = scores.table;
  const int64_t width = table.width;
  CHECK(mean.dim() == 2 && mean.size(0) == kept.size && mean.size(1) == width &&
            mean.is_contiguous() && options.smoothing == 0,
        kOp, ": mean must be what forward gave");
  const T* const means = mean.const_data_ptr<T>();
  const Buffer<T> row(width), item(width);
  for (int64_t i = 0; i < kept.count; ++i) {  // in order: a row may be named twice
    const int64_t slot = kept.slot[i], target = kept.target[i];
    const double of_loss = dloss[slot] / options.temperature;
    // of lse, which has the target too
    const double of_lse =
        of_loss * 2 * options.z_loss * lse[slot] + dlse[slot] / options.temperature;
    double of_target = of_lse;
    if (of_lse != 0) convert(table.items, target * table.items.stride, width, item.data());
    if (of_lse != 0 && options.softcap != 0) {
      convert(scores.hidden, kept.source[i] * scores.hidden.stride, width, row.data());
      double z = 0;
      for (int64_t k = 0; k < width; ++k) z += static_cast<double>(row[k]) * item[k];
      if (table.bias.data) {
        double bias = 0;
        convert(table.bias, target * table.bias.stride, 1, &bias);
        z += bias;
      }
      const double t = std::tanh(z / options.temperature / options.softcap);
      of_target *= 1 - t * t;
    }
    T* const out = dhidden + kept.source[i] * width;
    for (int64_t k = 0; k < width; ++k) {
      double sum = (of_loss + of_lse) * static_cast<double>(means[slot * width + k]);
      if (of_lse != 0) sum += of_target * static_cast<double>(item[k]);
      out[k] += static_cast<T>(sum);
    }
  }
}

template <typename T>
void backward(const Backward<T>& b, bool need_hidden, bool need_items) {
  const int64_t count = b.kept.count, lanes = kernels<T>().lanes;
  const int64_t padded = round_up(b.scores.table.width, lanes);
  const int64_t partial = need_hidden ? b.scores.threads(count) : 0;
  const int64_t row_bytes = (2 + partial) * padded * static_cast<int64_t>(sizeof(T)) + 64;
  const int64_t step = rows_per_chunk(count, row_bytes, kBlock<T>);
  // Sums of several chunks would be rounded to 16 bits between them: all rows at once for ditems.
  const bool apart = need_items && step < count && b.scores.is_half();
  if (apart || count == 0) b.run(0, count, false, need_items, false);
  if (apart && !need_hidden) return;
  for (int64_t first = 0; first < count; first += step) {
    b.run(first, std::min(step, count - first), need_hidden, need_items && !apart, first > 0);
  }
}

template <typename T>
void run_backward(const Scores& scores, const Kept& kept, const Options& options,
                  const Tensor& dloss, const Tensor& dlse, const Tensor& lse, const Tensor& stash,
                  const Tensor& mean, Outputs& out) {
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto in_type = [&](const Tensor& like, bool needed) {
    if (!needed || like.scalar_type() == type) return like;
    return torch::stable::new_zeros(like, like.sizes(), type);  // rounded to 16 bits once, below
  };
  Tensor dhidden = in_type(out.dhidden, out.need_hidden);
  Tensor dbias = in_type(out.dbias, out.need_bias);
  const Backward<T> b{scores,
                      kept,
                      options,
                      Values<T>("dloss", dloss, kept.size),
                      Values<T>("dlse", dlse, kept.size),
                      Values<double>("lse", lse, kept.size),
                      stash_in<T>(stash, scores, kept),
                      out.need_hidden ? dhidden.template mutable_data_ptr<T>() : nullptr,
                      out.need_items ? out.ditems.mutable_data_ptr() : nullptr,
                      out.need_bias ? dbias.template mutable_data_ptr<T>() : nullptr};
  const bool from_mean = out.need_hidden && mean.size(0) > 0;
  if (from_mean) b.rows_from(mean);
  if (!from_mean || out.need_items || out.need_bias) {
    backward<T>(b, out.need_hidden && !from_mean, out.need_items || out.need_bias);
  }
  if (out.need_hidden && dhidden.scalar_type() != out.dhidden.scalar_type()) {
    torch::stable::copy_(out.dhidden, dhidden);
  }
  if (out.need_bias && dbias.scalar_type() != out.dbias.scalar_type()) {
    torch::stable::copy_(out.dbias, dbias);
  }
}

std::tuple<Tensor, Tensor, Tensor> tied_softmax_loss_bwd_cpu(
    const Tensor& dloss, const Tensor& dlse, const Tensor& hidden, const Tensor& items,
    const Tensor& target, const std::optional<Tensor>& bias, const std::optional<Tensor>& rows,
    const Tensor& lse, const Tensor& stash, const Tensor& mean, double temperature, double softcap,
    double label_smoothing, double z_loss, int64_t ignore_index, bool need_hidden, bool need_items,
    bool need_bias) {
  const Scores scores(kOp, hidden, items, bias);
  const Options options(temperature, softcap, label_smoothing, z_loss);
  const Kept kept(kOp, scores, rows, &target, ignore_index);
  const auto like = [](const Tensor& tensor, bool needed, bool zero) {
    if (!needed) return torch::stable::new_empty(tensor, {0});
    return zero ? torch::stable::new_zeros(tensor, tensor.sizes())
                : torch::stable::new_empty(tensor, tensor.sizes());
  };
  need_bias = need_bias && bias.has_value();
  Outputs out{like(hidden, need_hidden, true),
              like(items, need_items, false),
              like(bias.has_value() ? *bias : hidden, need_bias, false),
              need_hidden,
              need_items,
              need_bias};
  use_huge_pages(out.ditems);
  if (scores.is_double()) {
    run_backward<double>(scores, kept, options, dloss, dlse, lse, stash, mean, out);
  } else {
    run_backward<float>(scores, kept, options, dloss, dlse, lse, stash, mean, out);
  }
  return {out.dhidden, out.ditems, out.dbias};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("tied_softmax_loss_fwd", TORCH_BOX(&t4r_fast::tied_softmax_loss_fwd_cpu));
  m.impl("tied_softmax_loss_bwd", TORCH_BOX(&t4r_fast::tied_softmax_loss_bwd_cpu));
}
