// Loops at the limit of the machine: multiply-add, exp, sequential read. One set per instruction
// set; host.cpp chooses at run time. Standard headers with functions stay out (see CMakeLists.txt).
#pragma once

#include <cstddef>

namespace t4r_fast {

// A hot loop's result goes here, or the compiler drops the loop.
struct FloorKernels {
  // `steps` steps of independent multiply-adds held in registers; returns how many FLOP they were.
  double (*multiply_add)(long steps, float* sink);
  // The sum of exp over n floats in the cache, all <= 0, n a multiple of 64.
  void (*exp_sum)(const float* x, size_t n, float* sink);
  // The sum of n floats, n a multiple of 256.
  void (*read)(const float* x, size_t n, float* sink);
};

extern const FloorKernels kFloorsPortable;
#ifdef __x86_64__
extern const FloorKernels kFloorsAvx2;
extern const FloorKernels kFloorsAvx512;
#endif

}  // namespace t4r_fast
