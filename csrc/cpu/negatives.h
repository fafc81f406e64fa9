// The negatives of sampled_softmax_loss: how they are drawn and weighed. The same ids as
// t4r_fast/plain/sampled_softmax_loss.py, bit for bit: build with -ffp-contract=off.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../draws.h"

namespace t4r_fast {

enum class Sampler : int64_t { kLogUniform, kUniform, kPopularity, kT4rec };
enum class Scope : int64_t { kBatch, kBlock, kRow };
constexpr int64_t kBlockRows = 128;

// Transformers4Rec's logit of a negative that is the target (finfo(float16).min / 100), and its
// guard against log(0)
constexpr double kT4recHit = -65504.0 / 100.0, kT4recEpsilon = 1e-16;

struct Negatives {
  // Draws `from` to `from + count` of a set, `from` even, in order.
  void draw(uint32_t set, int64_t from, int64_t count, int64_t* ids) const {
    for (int64_t i = 0; i < count; i += 2) {
      double u[2];
      unit_pair(seed, kNegative, set, static_cast<uint32_t>((from + i) / 2), u);
      ids[i] = item(u[0]);
      if (i + 1 < count) ids[i + 1] = item(u[1]);
    }
  }

  int64_t item(double u) const {
    switch (sampler) {
      case Sampler::kUniform:
        return low + uniform(u, items - low);
      case Sampler::kPopularity: {
        const double* end = cumulative + items;
        const int64_t found = std::upper_bound(cumulative, end, u * end[-1]) - cumulative;
        return found < items ? found : items - 1;
      }
      default:
        return low + log_uniform(u, items - low, log_size);
    }
  }

  // log of the probability of one draw
  double log_q(int64_t id) const {
    if (sampler == Sampler::kPopularity) {
      const double before = id > 0 ? cumulative[id - 1] : 0;
      return std::log((cumulative[id] - before) / cumulative[items - 1]);
    }
    if (id < low) return -std::numeric_limits<double>::infinity();
    if (sampler == Sampler::kUniform) return -std::log(static_cast<double>(items - low));
    return std::log(std::log1p(1.0 / (static_cast<double>(id - low) + 1.0)) / log_size);
  }

  // log of how often a set holds the id on average; of t4rec what the reference takes for it
  double expected(int64_t id) const {
    const double q = log_q(id);
    if (sampler != Sampler::kT4rec) return q + std::log(static_cast<double>(count));
    const double tries = 2.0 * static_cast<double>(count);
    return std::log(-std::expm1(-tries * std::log1p(std::exp(q))) + kT4recEpsilon);
  }

  // What is subtracted from a target's logit.
  double target_shift(int64_t id) const {
    if (sampler == Sampler::kT4rec) return expected(id) / temperature;
    return hits_grow() ? std::log1p(std::exp(expected(id))) : 0;
  }

  // What a negative's logit is lowered by, drawn `times` times in its set.
  double shift(int64_t id, int64_t times) const {
    if (sampler == Sampler::kT4rec) return expected(id) / temperature;
    return (logq ? expected(id) : 0) - (times > 1 ? std::log(static_cast<double>(times)) : 0);
  }

  // Accidental hits that stay are corrected as the target is.
  bool hits_grow() const { return logq && !remove_hits && sampler != Sampler::kT4rec; }
  double hit_growth(int64_t id) const {
    const double e = expected(id);
    return e - std::log1p(std::exp(e));
  }
  bool hits_matter() const { return remove_hits || hits_grow() || sampler == Sampler::kT4rec; }
  double hit_value() const {
    return sampler == Sampler::kT4rec ? kT4recHit / temperature
                                      : -std::numeric_limits<double>::infinity();
  }

  Seed seed;
  Sampler sampler;
  Scope scope;
  int64_t count, items, low;
  double log_size, temperature;
  bool logq, remove_hits;
  const double* cumulative;
};

// A set's different ids, ascending, and how often each was drawn.
struct DrawnSet {
  DrawnSet(const Negatives& negatives, uint32_t number) {
    const bool t4rec = negatives.sampler == Sampler::kT4rec;
    const int64_t draws = t4rec ? 2 * negatives.count : negatives.count;
    std::vector<int64_t> drawn(static_cast<size_t>(draws));
    negatives.draw(number, 0, draws, drawn.data());
    std::sort(drawn.begin(), drawn.end());
    for (const int64_t id : drawn) {
      if (!ids.empty() && ids.back() == id) {
        times.back() += !t4rec;
        continue;
      }
      // t4rec: the lowest of twice as many draws
      if (t4rec && size() == negatives.count) break;
      ids.push_back(id);
      times.push_back(1);
    }
  }

  int64_t size() const { return static_cast<int64_t>(ids.size()); }
  // The place of an id, or -1.
  int64_t find(int64_t id) const {
    const auto at = std::lower_bound(ids.begin(), ids.end(), id);
    return at != ids.end() && *at == id ? at - ids.begin() : -1;
  }

  std::vector<int64_t> ids, times;
};

}  // namespace t4r_fast
