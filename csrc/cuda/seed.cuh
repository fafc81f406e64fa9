// The seed tensor of ops that draw: only the kernel reads it, so nobody waits for the device.
#pragma once

#include "../draws.h"
#include "common.cuh"

namespace t4r_fast {
namespace {

struct SeedTensor {
  SeedTensor() = default;
  // `device` is where the op runs.
  SeedTensor(const char* op, const Tensor& seed, int32_t device) {
    CHECK_DIM(op, seed, 1, "(2,)");
    CHECK_INT64(op, seed);
    CHECK(seed.size(0) == 2, op, ": seed must have shape (2,); got (", seed.size(0), ",)");
    CHECK(seed.get_device_index() == device, op, ": seed must be on device ", device, "; got ",
          seed.get_device_index());
    data = seed.const_data_ptr<int64_t>();
    stride = seed.stride(0);
  }
  __device__ Seed read() const { return Seed::of(data[0], data[stride]); }

  const int64_t* data = nullptr;
  int64_t stride = 0;
};

}  // namespace
}  // namespace t4r_fast
