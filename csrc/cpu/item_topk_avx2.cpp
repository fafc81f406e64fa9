#include "simd_avx2.h"
// The vector unit comes first.
#include "item_topk_kernel.h"

namespace t4r_fast {

extern const TopkKernels<float> item_topk_f32_avx2;
extern const TopkKernels<double> item_topk_f64_avx2;
const TopkKernels<float> item_topk_f32_avx2 = topk_kernels<F32>();
const TopkKernels<double> item_topk_f64_avx2 = topk_kernels<F64>();

}  // namespace t4r_fast
