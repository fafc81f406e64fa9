// Reading the seed tensor of ops that draw.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "../draws.h"

namespace t4r_fast {

inline Seed read_seed(const char* op, const torch::stable::Tensor& seed) {
  CHECK_DIM(op, seed, 1, "(2,)");
  CHECK_INT64(op, seed);
  CHECK(seed.size(0) == 2, op, ": seed must have shape (2,); got (", seed.size(0), ",)");
  const int64_t* data = seed.const_data_ptr<int64_t>();
  return Seed::of(data[0], data[seed.stride(0)]);
}

}  // namespace t4r_fast
