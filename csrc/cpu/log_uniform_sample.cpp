// log_uniform_sample: the inverse distribution function in closed form; nothing depends on V.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "seed.h"

namespace t4r_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A pair of draws takes 50 ns: threads pay from some thousand on.
constexpr int64_t kPairsPerThread = 1024;

// Classes seen so far: open addressing, at most half full.
class Seen {
 public:
  explicit Seen(int64_t n) {
    uint64_t slots = 16;
    while (slots < 2 * static_cast<uint64_t>(n)) slots *= 2;
    slots_.assign(slots, -1);
  }
  // Whether c is new.
  bool add(int64_t c) {
    const uint64_t last = slots_.size() - 1;
    uint64_t at = (static_cast<uint64_t>(c) * 0x9E3779B97F4A7C15u >> 20) & last;
    while (slots_[at] >= 0) {
      if (slots_[at] == c) return false;
      at = (at + 1) & last;
    }
    slots_[at] = c;
    return true;
  }

 private:
  std::vector<int64_t> slots_;
};

int64_t draw_unique(const Seed& seed, int64_t n, int64_t size, double log_size, int64_t* classes) {
  Seen seen(n);
  int64_t found = 0, tries = 0;
  double u[2];
  while (found < n) {
    if (tries % 2 == 0) unit_pair(seed, kSample, 0, static_cast<uint32_t>(tries / 2), u);
    const int64_t c = log_uniform(u[tries % 2], size, log_size);
    ++tries;
    if (seen.add(c)) classes[found++] = c;
  }
  return tries;
}

std::tuple<Tensor, Tensor, Tensor> log_uniform_sample_fwd_cpu(const Tensor& seed_tensor, int64_t n,
                                                              int64_t size, int64_t low,
                                                              double log_size, bool unique) {
  const Seed seed = read_seed("log_uniform_sample", seed_tensor);
  CHECK(n >= 0 && size > 0, "log_uniform_sample: n must be >= 0 and size > 0; got ", n, ", ", size);
  CHECK(!unique || n <= size, "log_uniform_sample: n must be at most ", size, " with unique");
  Tensor ids = torch::stable::new_empty(seed_tensor, {n});
  Tensor log_prob = torch::stable::new_empty(seed_tensor, {n}, ScalarType::Float);
  Tensor tries = torch::stable::new_empty(seed_tensor, {});
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  float* out = log_prob.mutable_data_ptr<float>();
  const int64_t drawn = unique ? draw_unique(seed, n, size, log_size, id) : n;
  *tries.mutable_data_ptr<int64_t>() = drawn;

  torch::stable::parallel_for(0, (n + 1) / 2, kPairsPerThread, [&](int64_t pair, int64_t stop) {
    for (; pair < stop; ++pair) {
      const int64_t end = 2 * pair + 2 < n ? 2 * pair + 2 : n;
      double u[2];
      if (!unique) unit_pair(seed, kSample, 0, static_cast<uint32_t>(pair), u);
      for (int64_t i = 2 * pair; i < end; ++i) {
        const int64_t c = unique ? id[i] : log_uniform(u[i % 2], size, log_size);
        const double q = std::log1p(1.0 / (static_cast<double>(c) + 1.0)) / log_size;
        const double p = unique ? -std::expm1(static_cast<double>(drawn) * std::log1p(-q)) : q;
        id[i] = c + low;
        out[i] = static_cast<float>(std::log(p));
      }
    }
  });
  return {ids, log_prob, tries};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("log_uniform_sample_fwd", TORCH_BOX(&t4r_fast::log_uniform_sample_fwd_cpu));
}
