// tied_table_step: one optimizer step of an item table. For each tile of items the gradient is made
// in the cache, of the softmax (scores recomputed, as in tied_softmax_loss), of the lookups and of
// a formed gradient, and each row is updated and written once. A tile belongs to one thread: the
// bits do not depend on the number of threads.
#include "tied_table_step.h"

#include <cmath>
#include <limits>

#include "item_rows.h"

namespace t4r_fast {

extern const TableKernels<float> tied_table_step_f32_portable, tied_table_step_f32_avx2,
    tied_table_step_f32_avx512;
extern const TableKernels<double> tied_table_step_f64_portable, tied_table_step_f64_avx2,
    tied_table_step_f64_avx512;

namespace {

constexpr const char* kOp = "tied_table_step";

template <typename T>
const TableKernels<T>& kernels();

template <>
const TableKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(tied_table_step_f32);
}
template <>
const TableKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(tied_table_step_f64);
}

template <typename T>
constexpr ScalarType kScalar = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// ---- arguments

ItemTable table_of(const Tensor& items) {
  CHECK(items.dim() == 2 && items.size(0) > 0 && items.is_contiguous(), kOp,
        ": items must be contiguous with shape (V, D), V >= 1");
  return {matrix(kOp, "items", items), {nullptr, 0, Dtype::kFloat32}, items.size(0), items.size(1)};
}

template <typename T>
T* state_of(const char* name, const std::optional<Tensor>& state, const ItemTable& table,
            bool by_row) {
  CHECK(state.has_value(), kOp, ": state ", name, " must be given for this kind");
  CHECK(state->scalar_type() == kScalar<T> && state->is_contiguous() &&
            state->dim() == (by_row ? 1 : 2) && state->size(0) == table.count &&
            (by_row || state->size(1) == table.width),
        kOp, ": state ", name, " must be contiguous, of the type of sums, with a row per item");
  return static_cast<T*>(state->mutable_data_ptr());
}

struct RuleArguments {
  int64_t kind, step;
  double lr, beta1, beta2, eps, weight_decay, momentum, scale;
};

template <typename T>
TableRule<T> rule_of(const Tensor& items, const ItemTable& table,
                     const std::optional<Tensor>& first, const std::optional<Tensor>& second,
                     const RuleArguments& a) {
  CHECK(a.kind >= 0 && a.kind < kKinds, kOp, ": kind must be 0 to ", kKinds - 1, "; got ", a.kind);
  TableRule<T> r{a.kind,         a.step,     a.lr,    a.beta1, a.beta2, a.eps,
                 a.weight_decay, a.momentum, a.scale, nullptr, nullptr, nullptr};
  r.items = items.mutable_data_ptr();
  if (a.kind != kSgd || first.has_value()) {
    r.first = state_of<T>("first", first, table, a.kind == kRowwiseAdagrad);
  }
  if (a.kind == kAdamw || a.kind == kRowwiseAdamw) {
    r.second = state_of<T>("second", second, table, a.kind == kRowwiseAdamw);
  }
  return r;
}

struct GradientArguments {
  const std::vector<Tensor>&hidden, &target, &factors, &bias;
  const std::vector<int64_t>& bias_of;
  const std::vector<double>& options;
  const std::optional<Tensor>&ids, &rows, &formed;
};

// One loss: its rows packed, their targets and factors.
template <typename T>
struct Softmax {
  Softmax(const Tensor& items, const GradientArguments& g, size_t i, int64_t lanes)
      : scores(kOp, g.hidden[i], items, bias_of(g, i)),
        count(scores.hidden_count),
        packed(count, scores.table.width, lanes),
        targets(count),
        factors(4 * packed.lane_rows) {
    std::vector<int64_t> source(count);
    for (int64_t r = 0; r < count; ++r) source[r] = r;
    kernels<T>().pack(scores.hidden, source.data(), packed.view);
    const Integers target(kOp, "target", g.target[i]);
    CHECK(target.count == count, kOp, ": target must have one entry per row of hidden");
    for (int64_t r = 0; r < count; ++r) {
      CHECK(target[r] >= 0 && target[r] < scores.table.count, kOp,
            ": target must be 0 <= target < ", scores.table.count, " (the rows of items); got ",
            target[r], " at row ", r);
      targets[r] = {target[r], r};
    }
    std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
      const int64_t left = a.item / kTile, right = b.item / kTile;
      return left != right ? left < right : a.row < b.row;
    });
    fill_factors(g.factors[i]);
    view.table = scores.table;
    view.rows = packed.view;
    view.targets = targets.data();
    CHECK(g.options[2 * i] > 0 && g.options[2 * i + 1] >= 0, kOp,
          ": temperature must be > 0 and softcap >= 0");
    view.inverse_temperature = static_cast<T>(1 / g.options[2 * i]);
    view.softcap = static_cast<T>(g.options[2 * i + 1]);
    view.shift = factors.data();
    view.weight = view.shift + packed.lane_rows;
    view.constant = view.weight + packed.lane_rows;
    view.share = view.constant + packed.lane_rows;
    view.drows = nullptr;
    view.ditems = nullptr;
    view.dbias = nullptr;
    view.add = false;
  }

  static std::optional<Tensor> bias_of(const GradientArguments& g, size_t i) {
    const int64_t index = g.bias_of[i];
    CHECK(index < static_cast<int64_t>(g.bias.size()), kOp, ": bias_of must name a bias or be -1");
    if (index < 0) return std::nullopt;
    return g.bias[index];
  }

  void fill_factors(const Tensor& given) {
    CHECK(given.dim() == 2 && given.size(0) == 4 && given.size(1) == count &&
              given.scalar_type() == ScalarType::Double,
          kOp, ": factors must be float64 (4, ", count, ")");
    const double* in = given.const_data_ptr<double>();
    const int64_t stride = given.stride(0), apart = given.stride(1), n = packed.lane_rows;
    for (int64_t r = 0; r < n; ++r) {
      T* const out = factors.data() + r;
      out[0] = std::numeric_limits<T>::infinity();
      out[n] = out[2 * n] = out[3 * n] = 0;
      if (r >= count) continue;
      const double lse = in[r * apart];
      out[0] = static_cast<T>(lse);
      // What rounding took from lse: at |lse| = 1e4 it is 1e-3 of every probability.
      const double rest = lse - static_cast<double>(out[0]), weight = in[stride + r * apart];
      out[n] = static_cast<T>(rest == 0 ? weight : weight * std::exp(-rest));
      out[2 * n] = static_cast<T>(in[2 * stride + r * apart]);
      out[3 * n] = static_cast<T>(in[3 * stride + r * apart]);
    }
  }

  Scores scores;
  int64_t count;
  Packed<T> packed;
  std::vector<Target> targets;
  Buffer<T> factors;
  LossBackward<T> view;
};

// Sorted ids and their rows.
template <typename T>
void set_lookups(const std::optional<Tensor>& ids, const std::optional<Tensor>& rows,
                 TableGradient<T>* g) {
  g->ids = nullptr;
  g->rows = nullptr;
  g->lookups = 0;
  if (!ids.has_value()) return;
  CHECK(ids->dim() == 1 && ids->scalar_type() == ScalarType::Long && ids->is_contiguous(), kOp,
        ": ids must be int64 (K,)");
  g->lookups = ids->size(0);
  CHECK(rows.has_value() && rows->dim() == 2 && rows->size(0) == g->lookups &&
            rows->size(1) == g->table.width && rows->scalar_type() == kScalar<T> &&
            rows->is_contiguous(),
        kOp, ": rows must be contiguous (", g->lookups, ", ", g->table.width,
        ") of the type of sums");
  g->ids = ids->const_data_ptr<int64_t>();
  g->rows = static_cast<const T*>(rows->const_data_ptr());
  for (int64_t i = 0; i < g->lookups; ++i) {
    CHECK(g->ids[i] >= 0 && g->ids[i] < g->table.count && (i == 0 || g->ids[i - 1] <= g->ids[i]),
          kOp, ": ids must be sorted and 0 <= id < ", g->table.count, "; got ", g->ids[i],
          " at entry ", i);
  }
}

// The gradient's parts, kept alive here.
template <typename T>
struct Parts {
  Parts(const Tensor& items, const GradientArguments& a) {
    const size_t count = a.hidden.size();
    CHECK(a.target.size() == count && a.factors.size() == count && a.bias_of.size() == count &&
              a.options.size() == 2 * count,
          kOp, ": the lists of the losses must be equally long");
    gradient.table = table_of(items);
    gradient.padded = round_up(gradient.table.width, kernels<T>().lanes);
    losses.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      losses.push_back(std::make_unique<Softmax<T>>(items, a, i, kernels<T>().lanes));
      views.push_back(losses.back()->view);
      rows += losses.back()->count;
    }
    gradient.softmax = views.data();
    gradient.softmax_count = static_cast<int64_t>(count);
    set_lookups<T>(a.ids, a.rows, &gradient);
    gradient.formed = {nullptr, 0, Dtype::kFloat32};
    if (a.formed.has_value()) {
      CHECK(a.formed->dim() == 2 && a.formed->size(0) == gradient.table.count &&
                a.formed->size(1) == gradient.table.width,
            kOp, ": gradient must have the shape of items");
      formed = with_unit_rows(*a.formed);
      gradient.formed = matrix(kOp, "gradient", *formed);
    }
    tiles = (gradient.table.count + kTile - 1) / kTile;
  }

  int64_t threads() const {
    constexpr double kProductsPerThread = 2e6;  // some 20 us; waking a thread takes 5 us
    const double elements =
        static_cast<double>(gradient.table.count) * static_cast<double>(gradient.table.width);
    const double useful = static_cast<double>(rows + 8) * elements / kProductsPerThread;
    return std::min({static_cast<int64_t>(torch::stable::get_num_threads()),
                     static_cast<int64_t>(std::min(useful, 1e6)) + 1, tiles});
  }

  std::vector<std::unique_ptr<Softmax<T>>> losses;
  std::vector<LossBackward<T>> views;
  std::optional<Tensor> formed;
  TableGradient<T> gradient;
  int64_t tiles = 0, rows = 0;
};

template <typename T>
int64_t threads_for(int64_t rows, const ItemTable& table) {
  const int64_t useful = rows * table.width / 65536 + 1;  // some 20 us
  return std::max<int64_t>(
      1, std::min({static_cast<int64_t>(torch::stable::get_num_threads()), useful, rows}));
}

// ---- the functions

template <typename T>
void step(const Tensor& items, const std::optional<Tensor>& first,
          const std::optional<Tensor>& second, const GradientArguments& arguments,
          const RuleArguments& rule) {
  const Parts<T> parts(items, arguments);
  const TableRule<T> r = rule_of<T>(items, parts.gradient.table, first, second, rule);
  split_tiles(parts.tiles, parts.threads(), [&](int64_t, int64_t tile, int64_t stop) {
    const Buffer<T> scratch(table_scratch<T>(parts.gradient.padded));
    kernels<T>().step(parts.gradient, r, tile, stop, scratch.data());
  });
}

template <typename T>
double norm(const Tensor& items, const GradientArguments& arguments) {
  const Parts<T> parts(items, arguments);
  const Buffer<double> squares(parts.tiles);
  split_tiles(parts.tiles, parts.threads(), [&](int64_t, int64_t tile, int64_t stop) {
    const Buffer<T> scratch(table_scratch<T>(parts.gradient.padded));
    kernels<T>().norm(parts.gradient, squares.data(), tile, stop, scratch.data());
  });
  double total = 0;
  for (int64_t tile = 0; tile < parts.tiles; ++tile) total += squares[tile];
  return total;
}

template <typename T>
void step_rows(const Tensor& items, const std::optional<Tensor>& first,
               const std::optional<Tensor>& second, const Tensor& ids, const Tensor& rows,
               const RuleArguments& rule) {
  TableGradient<T> g{};
  g.table = table_of(items);
  g.padded = round_up(g.table.width, kernels<T>().lanes);
  set_lookups<T>(ids, rows, &g);
  const TableRule<T> r = rule_of<T>(items, g.table, first, second, rule);
  if (g.lookups == 0) return;
  const int64_t threads = threads_for<T>(g.lookups, g.table);
  const auto edge = [&](int64_t thread) {  // equal ids belong to one thread
    int64_t at = g.lookups * thread / threads;
    while (at > 0 && at < g.lookups && g.ids[at] == g.ids[at - 1]) ++at;
    return at;
  };
  split_tiles(threads, threads, [&](int64_t thread, int64_t, int64_t) {
    const Buffer<T> scratch(table_scratch<T>(g.padded));
    kernels<T>().rows(g, r, edge(thread), edge(thread + 1), scratch.data());
  });
}

struct MissedArguments {
  const Tensor& last;
  const std::optional<Tensor>& ids;
  int64_t base;
  const Tensor &lrs, &log_decay;
};

template <typename T>
void catch_up_rows(const Tensor& items, const std::optional<Tensor>& first,
                   const std::optional<Tensor>& second, const MissedArguments& a,
                   const RuleArguments& rule) {
  const ItemTable table = table_of(items);
  const TableRule<T> r = rule_of<T>(items, table, first, second, rule);
  const int64_t steps = a.lrs.dim() == 1 ? a.lrs.size(0) : -1;
  CHECK(a.last.dim() == 1 && a.last.size(0) == table.count && a.last.is_contiguous() &&
            a.last.scalar_type() == ScalarType::Int,
        kOp, ": last must be contiguous int32 (", table.count, ",)");
  CHECK(steps >= 0 && a.log_decay.dim() == 1 && a.log_decay.size(0) == steps + 1 &&
            a.lrs.is_contiguous() && a.log_decay.is_contiguous() &&
            a.lrs.scalar_type() == ScalarType::Double &&
            a.log_decay.scalar_type() == ScalarType::Double,
        kOp, ": lrs must be contiguous float64 (T,) and log_decay (T + 1,)");
  CHECK(a.base >= 0 && a.base + steps <= std::numeric_limits<int32_t>::max(), kOp,
        ": base must be >= 0 and base + T fit into int32");
  const bool moves = r.kind == kAdamw || r.kind == kRowwiseAdamw || r.weight_decay != 0 ||
                     (r.kind == kSgd && r.first != nullptr);
  MissedSteps missed{static_cast<int32_t*>(a.last.mutable_data_ptr()),
                     nullptr,
                     a.base,
                     moves ? steps : 0,
                     a.lrs.const_data_ptr<double>(),
                     a.log_decay.const_data_ptr<double>(),
                     0};
  for (int64_t i = 0; i < steps; ++i) {
    missed.highest_lr = std::max(missed.highest_lr, missed.lrs[i]);
  }
  int64_t count = table.count;
  if (a.ids.has_value()) {
    CHECK(a.ids->dim() == 1 && a.ids->scalar_type() == ScalarType::Long && a.ids->is_contiguous(),
          kOp, ": ids must be contiguous int64 (K,)");
    count = a.ids->size(0);
    missed.ids = a.ids->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) {
      CHECK(missed.ids[i] >= 0 && missed.ids[i] < table.count &&
                (i == 0 || missed.ids[i - 1] < missed.ids[i]),
            kOp, ": ids must be sorted, different and 0 <= id < ", table.count, "; got ",
            missed.ids[i], " at entry ", i);
    }
  }
  if (count == 0) return;
  if (moves) {
    const int64_t padded = round_up(table.width, kernels<T>().lanes);
    split_tiles(count, threads_for<T>(count, table), [&](int64_t, int64_t at, int64_t stop) {
      const Buffer<T> scratch(table_scratch<T>(padded));
      kernels<T>().catch_up(table, r, missed, at, stop, scratch.data());
    });
  } else if (missed.ids != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      missed.last[missed.ids[i]] = static_cast<int32_t>(a.base + steps);
    }
  }
}

bool is_double(const Tensor& items) {
  return items.scalar_type() == ScalarType::Double;
}

void tied_table_step_fwd_cpu(const Tensor& items, const std::optional<Tensor>& first,
                             const std::optional<Tensor>& second, const std::vector<Tensor>& hidden,
                             const std::vector<Tensor>& target, const std::vector<Tensor>& factors,
                             const std::vector<Tensor>& bias, const std::vector<int64_t>& bias_of,
                             const std::vector<double>& options, const std::optional<Tensor>& ids,
                             const std::optional<Tensor>& rows,
                             const std::optional<Tensor>& gradient, int64_t kind,
                             int64_t step_number, double lr, double beta1, double beta2, double eps,
                             double weight_decay, double momentum, double scale) {
  const GradientArguments g{hidden, target, factors, bias, bias_of, options, ids, rows, gradient};
  const RuleArguments r{kind, step_number, lr, beta1, beta2, eps, weight_decay, momentum, scale};
  is_double(items) ? step<double>(items, first, second, g, r)
                   : step<float>(items, first, second, g, r);
}

Tensor tied_table_step_norm_cpu(const Tensor& items, const std::vector<Tensor>& hidden,
                                const std::vector<Tensor>& target,
                                const std::vector<Tensor>& factors, const std::vector<Tensor>& bias,
                                const std::vector<int64_t>& bias_of,
                                const std::vector<double>& options,
                                const std::optional<Tensor>& ids, const std::optional<Tensor>& rows,
                                const std::optional<Tensor>& gradient) {
  const GradientArguments g{hidden, target, factors, bias, bias_of, options, ids, rows, gradient};
  Tensor total = torch::stable::new_empty(items, {}, ScalarType::Double);
  *total.mutable_data_ptr<double>() =
      is_double(items) ? norm<double>(items, g) : norm<float>(items, g);
  return total;
}

void tied_table_step_rows_cpu(const Tensor& items, const std::optional<Tensor>& first,
                              const std::optional<Tensor>& second, const Tensor& ids,
                              const Tensor& rows, int64_t kind, int64_t step_number, double lr,
                              double beta1, double beta2, double eps, double weight_decay,
                              double momentum, double scale) {
  const RuleArguments r{kind, step_number, lr, beta1, beta2, eps, weight_decay, momentum, scale};
  is_double(items) ? step_rows<double>(items, first, second, ids, rows, r)
                   : step_rows<float>(items, first, second, ids, rows, r);
}

void tied_table_step_catch_up_cpu(const Tensor& items, const std::optional<Tensor>& first,
                                  const std::optional<Tensor>& second, const Tensor& last,
                                  const std::optional<Tensor>& ids, int64_t base, const Tensor& lrs,
                                  const Tensor& log_decay, int64_t kind, int64_t step_number,
                                  double lr, double beta1, double beta2, double eps,
                                  double weight_decay, double momentum, double scale) {
  const MissedArguments m{last, ids, base, lrs, log_decay};
  const RuleArguments r{kind, step_number, lr, beta1, beta2, eps, weight_decay, momentum, scale};
  is_double(items) ? catch_up_rows<double>(items, first, second, m, r)
                   : catch_up_rows<float>(items, first, second, m, r);
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("tied_table_step_fwd", TORCH_BOX(&t4r_fast::tied_table_step_fwd_cpu));
  m.impl("tied_table_step_norm", TORCH_BOX(&t4r_fast::tied_table_step_norm_cpu));
  m.impl("tied_table_step_rows", TORCH_BOX(&t4r_fast::tied_table_step_rows_cpu));
  m.impl("tied_table_step_catch_up", TORCH_BOX(&t4r_fast::tied_table_step_catch_up_cpu));
}
