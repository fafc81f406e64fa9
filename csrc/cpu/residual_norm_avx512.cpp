#include "simd_avx512.h"
// The vector unit comes first.
#include "residual_norm_kernel.h"

namespace t4r_fast {

extern const NormKernels<float> residual_norm_f32_avx512;
extern const NormKernels<double> residual_norm_f64_avx512;
const NormKernels<float> residual_norm_f32_avx512 = norm_kernels<F32>();
const NormKernels<double> residual_norm_f64_avx512 = norm_kernels<F64>();

}  // namespace t4r_fast
