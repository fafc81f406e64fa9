#include "simd_portable.h"
// The vector unit comes first.
#include "activation_dropout_kernel.h"

namespace t4r_fast {

extern const ActivationKernels<float> activation_dropout_f32_portable;
extern const ActivationKernels<double> activation_dropout_f64_portable;
const ActivationKernels<float> activation_dropout_f32_portable = activation_kernels<F32>();
const ActivationKernels<double> activation_dropout_f64_portable = activation_kernels<F64>();

}  // namespace t4r_fast
