#include "simd_avx512.h"
// The vector unit comes first.
#include "activation_dropout_kernel.h"

namespace t4r_fast {

extern const ActivationKernels<float> activation_dropout_f32_avx512;
extern const ActivationKernels<double> activation_dropout_f64_avx512;
const ActivationKernels<float> activation_dropout_f32_avx512 = activation_kernels<F32>();
const ActivationKernels<double> activation_dropout_f64_avx512 = activation_kernels<F64>();

}  // namespace t4r_fast
