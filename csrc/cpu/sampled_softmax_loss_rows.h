// sampled_softmax_loss with negatives of single rows, the part of sampled_softmax_loss.cpp that
// scope "row" needs. Forward takes some candidates of a row at a time. Backward sorts all draws by
// item: each item is read once, meets the rows that drew it, and its gradient is written once.
#pragma once

#include "sampled_softmax_loss_gradients.h"
#include "sampled_softmax_loss_problem.h"

namespace t4r_fast {
namespace {

template <typename T>
void rows_forward(const Forward<T>& f) {
  const Problem& p = f.p;
  const Negatives& negatives = p.negatives;
  const int64_t width = p.width(), padded = round_up(width, kernels<T>().lanes);
  const T removed = static_cast<T>(negatives.hit_value());
  // A row takes some 100 ns for each negative.
  torch::stable::parallel_for(0, p.kept.count, 4, [&](int64_t i, int64_t stop) {
    const Buffer<T> hidden(padded), copy(kTile * padded), mean(padded), spare(padded);
    const Buffer<T> shift(kTile), z(kTile);
    std::vector<int64_t> ids(kTile);
    for (; i < stop; ++i) {
      const int64_t target = p.kept.target[i];
      T top = std::numeric_limits<T>::lowest();
      double total = 0;
      kernels<T>().gather(p.scores.hidden, &p.kept.source[i], 1, width, padded, hidden.data());
      std::fill_n(mean.data(), padded, T(0));
      for (int64_t from = 0; from < negatives.count; from += kTile) {
        const int64_t count = std::min<int64_t>(kTile, negatives.count - from);
        negatives.draw(static_cast<uint32_t>(p.kept.slot[i]), from, count, ids.data());
        for (int64_t v = 0; v < count; ++v) {
          const int64_t id = ids[v];
          shift[v] = static_cast<T>(negatives.shift(id, 1) - p.bias(id) / negatives.temperature);
          z[v] = id != target            ? T(0)
                 : negatives.remove_hits ? removed
                 : negatives.hits_grow() ? static_cast<T>(negatives.hit_growth(id))
                                         : T(0);
        }
        kernels<T>().gather(p.scores.table.items, ids.data(), count, width, padded, copy.data());
        kernels<T>().row_forward({hidden.data(), copy.data(), shift.data(), count, padded,
                                  static_cast<T>(1 / negatives.temperature), z.data(), &top, &total,
                                  f.unit ? mean.data() : nullptr, spare.data()});
      }
      f.finish(i, top, total, mean.data(), hidden.data(), copy.data());
    }
  });
}

// All draws of all rows by item; `at` is the kept row.
inline std::vector<IdAt> sorted_draws(const Problem& p) {
  const int64_t count = p.negatives.count;
  std::vector<IdAt> draws(static_cast<size_t>(p.kept.count * count)), spare;
  torch::stable::parallel_for(0, p.kept.count, 16, [&](int64_t i, int64_t stop) {
    std::vector<int64_t> ids(static_cast<size_t>(count));
    for (; i < stop; ++i) {
      p.negatives.draw(static_cast<uint32_t>(p.kept.slot[i]), 0, count, ids.data());
      for (int64_t v = 0; v < count; ++v) draws[i * count + v] = {ids[v], i};
    }
  });
  sort_by_id(draws, spare);
  return draws;
}

// Entries [first, last) of the draws, all of one item.
template <typename T>
struct ItemRows {
  std::vector<int64_t> row;
  std::vector<T> lower;
  T factor;

  void fill(const Problem& p, const IdAt* first, const IdAt* last) {
    const Negatives& negatives = p.negatives;
    const int64_t id = first->id;
    const double shift = negatives.shift(id, 1) - p.bias(id) / negatives.temperature;
    const double of_hit = negatives.remove_hits   ? std::numeric_limits<double>::infinity()
                          : negatives.hits_grow() ? shift - negatives.hit_growth(id)
                                                  : shift;
    factor = static_cast<T>(p.shift_factor(shift, static_cast<double>(static_cast<T>(shift))));
    row.clear();
    lower.clear();
    for (; first < last; ++first) {
      row.push_back(first->at);
      lower.push_back(static_cast<T>(p.kept.target[first->at] == id ? of_hit : shift));
    }
  }
};

template <typename T>
ItemSums<T> row_gradients(const Backward<T>& b, Touched& touched) {
  const Problem& p = b.p;
  const int64_t width = p.width(), padded = round_up(width, kernels<T>().lanes);
  const std::vector<IdAt> draws = sorted_draws(p);
  const int64_t rows = p.kept.count;
  const Buffer<T> hidden(rows * padded), shift(rows), weight(rows);
  kernels<T>().gather(p.scores.hidden, p.kept.source.data(), rows, width, padded, hidden.data());
  for (int64_t i = 0; i < rows; ++i) b.row_weight(i, &shift[i], &weight[i]);

  for (const int64_t target : p.kept.target) touched.add(target);
  for (size_t i = 0; i < draws.size(); ++i) {
    if (i == 0 || draws[i].id != draws[i - 1].id) touched.add(draws[i].id);
  }
  touched.finish();
  std::vector<int64_t> work(static_cast<size_t>(touched.size()), 1), first(work.size() + 1);
  int64_t at = 0;
  for (int64_t i = 0; i < touched.size(); ++i) {
    first[i] = at;
    while (at < static_cast<int64_t>(draws.size()) && draws[at].id == touched.ids[i]) ++at;
    work[i] += at - first[i];
  }
  first.back() = at;

  const ItemSums<T> sums(b.like, touched.size(), width, p.sum_type());
  const std::vector<IdAt> targets = target_places(p, touched);
  const std::vector<int64_t> edges = split_work(work);
  const auto one_item = [&](int64_t i, const T* item, T* sum, ItemRows<T>& entries) {
    sums.dbias[i] = 0;
    std::fill_n(sum, padded, T(0));
    if (first[i] < first[i + 1]) {
      entries.fill(p, draws.data() + first[i], draws.data() + first[i + 1]);
      kernels<T>().row_backward({item, hidden.data(), entries.row.data(), first[i + 1] - first[i],
                                 padded, static_cast<T>(1 / p.negatives.temperature), shift.data(),
                                 weight.data(), entries.lower.data(), entries.factor, sum,
                                 sum + padded, &sums.dbias[i]});
    }
    std::copy_n(sum, width, sums.ditems + i * width);
  };
  const auto part = [&](int64_t from, int64_t to) {
    const Buffer<T> copy(kTile * padded), sum(2 * padded);
    ItemRows<T> entries;
    for (int64_t start = from; start < to; start += kTile) {
      const int64_t count = std::min<int64_t>(kTile, to - start);
      kernels<T>().gather(p.scores.table.items, touched.ids.data() + start, count, width, padded,
                          copy.data());
      for (int64_t i = 0; i < count; ++i) {
        one_item(start + i, copy.data() + i * padded, sum.data(), entries);
      }
    }
    const auto vector = [&](int64_t row) { return hidden.data() + row * padded; };
    add_targets(b, targets, from, to, vector, sums.ditems, sums.dbias);
  };
  torch::stable::parallel_for(0, static_cast<int64_t>(edges.size()) - 1, 1,
                              [&](int64_t i, int64_t stop) {
                                for (; i < stop; ++i) part(edges[i], edges[i + 1]);
                              });
  return sums;
}

}  // namespace
}  // namespace t4r_fast
