#include "simd_portable.h"
// The vector unit comes first.
#include "residual_norm_kernel.h"

namespace t4r_fast {

extern const NormKernels<float> residual_norm_f32_portable;
extern const NormKernels<double> residual_norm_f64_portable;
const NormKernels<float> residual_norm_f32_portable = norm_kernels<F32>();
const NormKernels<double> residual_norm_f64_portable = norm_kernels<F64>();

}  // namespace t4r_fast
