// Item gradients of sampled_softmax_loss for negatives that rows share. Part of
// sampled_softmax_loss.cpp.
#pragma once

#include "sampled_softmax_loss_problem.h"

namespace t4r_fast {
namespace {

// The ids that have a gradient, ascending, and where those of targets are.
struct Touched {
  void add(int64_t id) { ids.push_back(id); }
  void finish() {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  }
  int64_t find(int64_t id) const {
    return std::lower_bound(ids.begin(), ids.end(), id) - ids.begin();
  }
  int64_t size() const { return static_cast<int64_t>(ids.size()); }

  std::vector<int64_t> ids;
};

// Gradients of the touched items, in the type of the sums, and of their biases.
template <typename T>
struct ItemSums {
  ItemSums(const Tensor& like, int64_t size, int64_t width, ScalarType type)
      : items(torch::stable::new_empty(like, {size, width}, type)),
        biases(torch::stable::new_empty(like, {size}, ScalarType::Double)),
        ditems(items.mutable_data_ptr<T>()),
        dbias(biases.mutable_data_ptr<double>()) {}
  Tensor items, biases;
  T* ditems;
  double* dbias;
};

template <typename T>
struct Backward {
  const Problem& p;
  const Tensor& like;
  const T* dloss;
  int64_t dloss_stride;
  const T* loss;
  const double* lse;

  double scaled(int64_t i) const {
    return static_cast<double>(dloss[p.kept.slot[i] * dloss_stride]) / p.negatives.temperature;
  }
  // dz of row i's negatives = weight exp(z - shift). What rounding took from lse goes into weight:
  // at |lse| = 1e4 it is 1e-3 of every probability.
  void row_weight(int64_t i, T* shift, T* weight) const {
    const double of_row = lse[p.kept.slot[i]];
    *shift = static_cast<T>(of_row);
    const double rest = of_row - static_cast<double>(*shift);
    *weight = static_cast<T>(rest == 0 ? scaled(i) : scaled(i) * std::exp(-rest));
  }
  // dz of row i's target
  T target_weight(int64_t i) const {
    return static_cast<T>(std::expm1(-static_cast<double>(loss[p.kept.slot[i]])) * scaled(i));
  }
};

// (out row, kept row) of the targets, by out row.
inline std::vector<IdAt> target_places(const Problem& p, const Touched& touched) {
  std::vector<IdAt> places(static_cast<size_t>(p.kept.count)), spare;
  for (int64_t i = 0; i < p.kept.count; ++i) places[i] = {touched.find(p.kept.target[i]), i};
  sort_by_id(places, spare);
  return places;
}

// Parts of [0, size) with about equal work; the split changes no bits.
inline std::vector<int64_t> split_work(const std::vector<int64_t>& work) {
  int64_t total = 0;
  for (const int64_t w : work) total += w;
  // 64 products of a row and an item take some 10 us
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), total / 512));
  std::vector<int64_t> edges{0};
  int64_t done = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(work.size()); ++i) {
    done += work[i];
    if (done * parts >= total * static_cast<int64_t>(edges.size())) edges.push_back(i + 1);
  }
  edges.back() = static_cast<int64_t>(work.size());
  return edges;
}

// Rows of the item gradient from targets: places[..] of out rows [from, to), `hidden` gives a kept
// row's converted vector.
template <typename T, typename Hidden>
void add_targets(const Backward<T>& b, const std::vector<IdAt>& places, int64_t from, int64_t to,
                 const Hidden& hidden, T* ditems, double* dbias) {
  const int64_t width = b.p.width();
  auto at = std::lower_bound(places.begin(), places.end(), from,
                             [](const IdAt& e, int64_t place) { return e.id < place; });
  for (; at != places.end() && at->id < to; ++at) {
    const T weight = b.target_weight(at->at);
    const T* h = hidden(at->at);
    T* out = ditems + at->id * width;
    for (int64_t k = 0; k < width; ++k) out[k] += weight * h[k];
    dbias[at->id] += static_cast<double>(weight);
  }
}

template <typename T>
void group_gradients(const Backward<T>& b, const Group<T>& g, const std::vector<int64_t>& place,
                     const Buffer<T>& shift, const Buffer<T>& weight, int64_t from, int64_t to,
                     T* ditems, double* dbias) {
  const int64_t first = std::lower_bound(place.begin(), place.end(), from) - place.begin();
  const int64_t last = std::lower_bound(place.begin(), place.end(), to) - place.begin();
  if (first == last) return;
  std::vector<int64_t> hit(g.hit);
  for (int64_t& h : hit) h -= h < 0 ? 0 : first;  // negative: another thread's
  const Buffer<T> copy = g.room(last - first), scratch(sampled_scratch<T>(g.packed.view.padded));
  SampledBackward<T> a;
  a.rows = g.packed.view;
  a.candidates = g.gather(b.p, first, last, copy, false);
  a.hits = g.hits(b.p, hit.data());
  a.inverse_temperature = static_cast<T>(1 / b.p.negatives.temperature);
  a.shift = shift.data();
  a.weight = weight.data();
  a.place = place.data() + first;
  a.factor = g.factor.data() + first;
  a.ditems = ditems;
  a.dbias = dbias;
  kernels<T>().backward(a, scratch.data());
}

// For negatives that rows share.
template <typename T>
ItemSums<T> shared_gradients(const Backward<T>& b, Touched& touched) {
  const Problem& p = b.p;
  const std::vector<Range> sets = ranges(p);
  std::vector<std::unique_ptr<Group<T>>> groups(sets.size());
  std::vector<Buffer<T>> shift, weight;
  torch::stable::parallel_for(0, static_cast<int64_t>(sets.size()), 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      groups[i] = std::make_unique<Group<T>>(p, sets[i].first, sets[i].stop, sets[i].number);
    }
  });
  for (const int64_t target : p.kept.target) touched.add(target);
  for (const auto& g : groups) {
    touched.ids.insert(touched.ids.end(), g->drawn.ids.begin(), g->drawn.ids.end());
  }
  touched.finish();
  std::vector<int64_t> work(static_cast<size_t>(touched.size()), 1);
  std::vector<std::vector<int64_t>> place(groups.size());
  for (size_t s = 0; s < groups.size(); ++s) {
    const Group<T>& g = *groups[s];
    int64_t at = 0;
    for (const int64_t id : g.drawn.ids) {
      while (touched.ids[at] < id) ++at;
      place[s].push_back(at);
      work[at] += g.count;
    }
    shift.emplace_back(g.packed.lane_rows);
    weight.emplace_back(g.packed.lane_rows);
    for (int64_t i = 0; i < g.packed.lane_rows; ++i) {
      shift[s][i] = std::numeric_limits<T>::infinity();
      weight[s][i] = 0;
      if (i < g.count) b.row_weight(g.first + i, &shift[s][i], &weight[s][i]);
    }
  }
  const ItemSums<T> sums(b.like, touched.size(), p.width(), p.sum_type());
  const std::vector<IdAt> targets = target_places(p, touched);
  const std::vector<int64_t> edges = split_work(work);
  const bool biased = p.scores.table.bias.data != nullptr;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(edges.size()) - 1, 1, [&](int64_t part, int64_t stop) {
        for (; part < stop; ++part) {
          const int64_t from = edges[part], to = edges[part + 1];
          std::fill_n(sums.ditems + from * p.width(), (to - from) * p.width(), T(0));
          std::fill_n(sums.dbias + from, to - from, 0.0);
          for (size_t s = 0; s < groups.size(); ++s) {
            group_gradients(b, *groups[s], place[s], shift[s], weight[s], from, to, sums.ditems,
                            biased ? sums.dbias : nullptr);
          }
          const auto hidden = [&](int64_t row) {
            const auto after =
                std::upper_bound(sets.begin(), sets.end(), row,
                                 [](int64_t r, const Range& set) { return r < set.stop; });
            const Group<T>& g = *groups[after - sets.begin()];
            return g.packed.view.rows + (row - g.first) * g.packed.view.padded;
          };
          add_targets(b, targets, from, to, hidden, sums.ditems, sums.dbias);
        }
      });
  return sums;
}

}  // namespace
}  // namespace t4r_fast
