#include "simd_portable.h"
// The vector unit comes first.
#include "sampled_softmax_loss_kernel.h"

namespace t4r_fast {

extern const SampledKernels<float> sampled_softmax_loss_f32_portable;
extern const SampledKernels<double> sampled_softmax_loss_f64_portable;
const SampledKernels<float> sampled_softmax_loss_f32_portable = sampled_kernels<F32>();
const SampledKernels<double> sampled_softmax_loss_f64_portable = sampled_kernels<F64>();

}  // namespace t4r_fast
