// Host side of dropout: the key of a site. Files for one instruction set include dropout.h alone.
#pragma once

#include <cmath>
#include <optional>

#include "dropout.h"
#include "seed.h"

namespace t4r_fast {

// The last of the eight draw kinds of draws.h.
constexpr uint32_t kDropoutDraw = 7;

// seed  none: nothing is drawn
inline Dropout dropout_of(const char* op, const std::optional<torch::stable::Tensor>& given,
                          int64_t site, double probability) {
  CHECK(probability >= 0 && probability < 1, op, ": dropout must be 0 <= dropout < 1; got ",
        probability);
  CHECK(site >= 0 && site <= UINT32_MAX, op, ": site must be 0 <= site < 2**32; got ", site);
  Dropout out{0, 0, false, 1.0};
  if (!given.has_value()) return out;
  out.scale = 1 / (1 - probability);
  // ties to even, as Python's round; 2**32 at most, next to 1: then no word is above `least`
  const double limit = std::nearbyint(probability * 0x1p32);
  if (limit == 0) return out;
  const Seed seed = read_seed(op, *given);
  const Words words =
      philox(seed.key, {{static_cast<uint32_t>(site), 0, seed.kind | kDropoutDraw, seed.low}});
  out.key = words.w[0] | uint64_t{words.w[1]} << 32;
  out.least = static_cast<uint32_t>(limit - 1);
  out.draws = true;
  return out;
}

}  // namespace t4r_fast
