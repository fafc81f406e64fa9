#include "simd_avx512.h"
// The vector unit comes first.
#include "tied_softmax_loss_kernel.h"

namespace t4r_fast {

extern const LossKernels<float> tied_softmax_loss_f32_avx512;
extern const LossKernels<double> tied_softmax_loss_f64_avx512;
const LossKernels<float> tied_softmax_loss_f32_avx512 = loss_kernels<F32>();
const LossKernels<double> tied_softmax_loss_f64_avx512 = loss_kernels<F64>();

}  // namespace t4r_fast
