#include "simd_avx2.h"
// The vector unit comes first.
#include "sampled_softmax_loss_kernel.h"

namespace t4r_fast {

extern const SampledKernels<float> sampled_softmax_loss_f32_avx2;
extern const SampledKernels<double> sampled_softmax_loss_f64_avx2;
const SampledKernels<float> sampled_softmax_loss_f32_avx2 = sampled_kernels<F32>();
const SampledKernels<double> sampled_softmax_loss_f64_avx2 = sampled_kernels<F64>();

}  // namespace t4r_fast
