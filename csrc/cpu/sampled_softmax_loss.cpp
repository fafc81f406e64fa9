// sampled_softmax_loss: cross-entropy over the target and drawn negatives.
// Shared negatives (one set for all rows, or one per 128 rows) are drawn, sorted and merged, their
// rows of the table gathered once; then rows and candidates meet in small matrix products with a
// running log-sum-exp, as in attention. Backward draws them again. A row of the item gradient
// belongs to one thread, which adds to it in a fixed order: the bits do not depend on the number
// of threads. Negatives of single rows: see sampled_softmax_loss_rows.h.
#include "sampled_softmax_loss_gradients.h"
#include "sampled_softmax_loss_rows.h"

namespace t4r_fast {
namespace {

template <typename T>
void Forward<T>::group(const Range& range, bool parallel) const {
  const Group<T> g(p, range.first, range.stop, range.number);
  const int64_t padded = g.packed.view.padded;
  const Buffer<T> copy = g.room(g.drawn.size()), top(g.packed.lane_rows);
  const Buffer<double> total(g.packed.lane_rows);
  const Buffer<T> mean(unit ? g.count * padded : 0);
  SampledForward<T> a;
  a.rows = g.packed.view;
  a.candidates = g.gather(p, 0, g.drawn.size(), copy, parallel);
  a.hits = g.hits(p, g.hit.data());
  a.inverse_temperature = static_cast<T>(1 / p.negatives.temperature);
  a.top = top.data();
  a.total = total.data();
  a.mean = unit ? mean.data() : nullptr;
  const auto panels = [&](int64_t panel, int64_t stop) {
    const Buffer<T> scratch(sampled_scratch<T>(padded)), target(p.width());
    kernels<T>().forward(a, panel, stop, scratch.data());
    const int64_t end = std::min(stop * kPanel<T>, g.count);
    for (int64_t i = panel * kPanel<T>; i < end; ++i) {
      finish(g.first + i, top[i], total[i], unit ? mean.data() + i * padded : nullptr,
             g.packed.view.rows + i * padded, target.data());
    }
  };
  const int64_t count = (g.count + kPanel<T> - 1) / kPanel<T>;
  if (parallel) {
    torch::stable::parallel_for(0, count, 1, panels);
  } else {
    panels(0, count);
  }
}

template <typename T>
void forward(const Problem& p, T* loss, double* lse, T* unit) {
  const Forward<T> f{p, loss, lse, unit};
  if (p.negatives.scope == Scope::kRow) return rows_forward(f);
  const std::vector<Range> sets = ranges(p);
  const int64_t count = static_cast<int64_t>(sets.size());
  if (count == 1) return f.group(sets[0], true);
  torch::stable::parallel_for(0, count, 1, [&](int64_t i, int64_t stop) {
    for (; i < stop; ++i) f.group(sets[i], false);
  });
}

std::tuple<Tensor, Tensor, Tensor> sampled_softmax_loss_fwd_cpu(
    const Tensor& hidden, const Tensor& items, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& cumulative, const Tensor& seed, int64_t num_negatives,
    int64_t sampler, int64_t scope, int64_t low, double log_size, bool logq, bool remove_hits,
    double temperature, int64_t ignore_index, bool needs_unit) {
  const Problem p(hidden, items, target, bias, rows, cumulative, seed, num_negatives, sampler,
                  scope, low, log_size, logq, remove_hits, temperature, ignore_index);
  const int64_t size = p.kept.size;
  Tensor loss = torch::stable::new_zeros(hidden, {size}, p.sum_type());
  Tensor lse = torch::stable::new_zeros(hidden, {size}, ScalarType::Double);
  Tensor unit = torch::stable::new_zeros(hidden, {needs_unit ? size : 0, p.width()}, p.sum_type());
  double* lse_data = lse.mutable_data_ptr<double>();
  if (p.scores.is_double()) {
    forward<double>(p, loss.mutable_data_ptr<double>(), lse_data,
                    needs_unit ? unit.mutable_data_ptr<double>() : nullptr);
  } else {
    forward<float>(p, loss.mutable_data_ptr<float>(), lse_data,
                   needs_unit ? unit.mutable_data_ptr<float>() : nullptr);
  }
  return {loss, lse, unit};
}

Tensor in_dtype(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  Tensor out = torch::stable::new_empty(tensor, tensor.sizes(), type);
  torch::stable::copy_(out, tensor);
  return out;
}

template <typename T>
Tensor hidden_gradient(const Backward<T>& b, const Tensor& hidden, const Tensor& unit) {
  const Problem& p = b.p;
  const int64_t width = p.width();
  Tensor sums = torch::stable::new_zeros(hidden, {hidden.size(0), width}, p.sum_type());
  const Tensor dense = torch::stable::contiguous(unit);
  CHECK(dense.dim() == 2 && dense.size(0) == p.kept.size && dense.size(1) == width, kOp,
        ": unit must have shape (", p.kept.size, ", ", width, ")");
  const T* from = dense.const_data_ptr<T>();
  T* to = sums.mutable_data_ptr<T>();
  const auto part = [&](int64_t i, int64_t stop) {
    for (; i < stop; ++i) {
      const T factor = b.dloss[p.kept.slot[i] * b.dloss_stride];
      const T* row = from + p.kept.slot[i] * width;
      T* out = to + p.kept.source[i] * width;
      for (int64_t k = 0; k < width; ++k) out[k] += factor * row[k];
    }
  };
  if (p.named) {
    part(0, p.kept.count);  // in order: a row may be named twice
  } else {
    torch::stable::parallel_for(0, p.kept.count, 1024, part);
  }
  return in_dtype(sums, hidden.scalar_type());
}

struct ItemGradients {
  Tensor ids, ditems, dbias;
};

// Rows of touched items in the dtype of `like`: as they are, or put into zeros.
Tensor spread(const Tensor& sums, const Tensor& like, const Touched& touched, bool sparse) {
  const Tensor rows = in_dtype(sums, like.scalar_type());
  if (sparse) return rows;
  Tensor dense = torch::stable::new_zeros(like, like.sizes());
  const int64_t width = rows.dim() == 2 ? rows.size(1) : 1;
  const int64_t bytes = width * dense.element_size();
  char* to = static_cast<char*>(dense.mutable_data_ptr());
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  for (int64_t i = 0; i < touched.size(); ++i) {
    std::memcpy(to + touched.ids[i] * bytes, from + i * bytes, bytes);
  }
  return dense;
}

template <typename T>
ItemGradients item_gradients(const Backward<T>& b, const Tensor& items, const Tensor& target,
                             const std::optional<Tensor>& bias, bool sparse) {
  Touched touched;
  const ItemSums<T> sums =
      b.p.negatives.scope == Scope::kRow ? row_gradients(b, touched) : shared_gradients(b, touched);
  Tensor ids = torch::stable::new_empty(target, {sparse ? touched.size() : 0});
  if (sparse && touched.size() > 0) {
    std::memcpy(ids.mutable_data_ptr(), touched.ids.data(), sizeof(int64_t) * touched.ids.size());
  }
  Tensor of_bias = bias.has_value() ? spread(sums.biases, *bias, touched, sparse)
                                    : torch::stable::new_empty(items, {0});
  return {ids, spread(sums.items, items, touched, sparse), of_bias};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Problem& p, const Tensor& dloss,
                                                    const Tensor& loss, const Tensor& lse,
                                                    const Tensor& unit, const Tensor& hidden,
                                                    const Tensor& items, const Tensor& target,
                                                    const std::optional<Tensor>& bias, bool sparse,
                                                    bool needs_hidden, bool needs_items) {
  for (const Tensor* t : {&dloss, &loss, &lse}) {
    CHECK(t->dim() == 1 && t->size(0) == p.kept.size, kOp,
          ": dloss, loss and lse must have shape (", p.kept.size, ",)");
  }
  const Tensor losses = torch::stable::contiguous(loss), sums = torch::stable::contiguous(lse);
  const Backward<T> b{p,
                      items,
                      dloss.const_data_ptr<T>(),
                      p.kept.size > 0 ? dloss.stride(0) : 0,
                      losses.const_data_ptr<T>(),
                      sums.const_data_ptr<double>()};
  Tensor dhidden = needs_hidden ? hidden_gradient(b, hidden, unit)
                                : torch::stable::new_empty(hidden, {0, p.width()});
  ItemGradients out{torch::stable::new_empty(target, {0}),
                    torch::stable::new_empty(items, {0, p.width()}),
                    torch::stable::new_empty(bias.has_value() ? *bias : items, {0})};
  if (needs_items) out = item_gradients(b, items, target, bias, sparse);
  return {dhidden, out.ids, out.ditems, out.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_softmax_loss_bwd_cpu(
    const Tensor& dloss, const Tensor& hidden, const Tensor& items, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& cumulative, const Tensor& seed, const Tensor& loss,
    const Tensor& lse, const Tensor& unit, int64_t num_negatives, int64_t sampler, int64_t scope,
    int64_t low, double log_size, bool logq, bool remove_hits, double temperature,
    int64_t ignore_index, bool sparse, bool needs_hidden, bool needs_items) {
  const Problem p(hidden, items, target, bias, rows, cumulative, seed, num_negatives, sampler,
                  scope, low, log_size, logq, remove_hits, temperature, ignore_index);
  const auto run = p.scores.is_double() ? backward<double> : backward<float>;
  return run(p, dloss, loss, lse, unit, hidden, items, target, bias, sparse, needs_hidden,
             needs_items);
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("sampled_softmax_loss_fwd", TORCH_BOX(&t4r_fast::sampled_softmax_loss_fwd_cpu));
  m.impl("sampled_softmax_loss_bwd", TORCH_BOX(&t4r_fast::sampled_softmax_loss_bwd_cpu));
}
