#include "simd_avx2.h"
// The vector unit comes first.
#include "target_rank_kernel.h"

namespace t4r_fast {

extern const RankKernels<float> target_rank_f32_avx2;
extern const RankKernels<double> target_rank_f64_avx2;
const RankKernels<float> target_rank_f32_avx2 = rank_kernels<F32>();
const RankKernels<double> target_rank_f64_avx2 = rank_kernels<F64>();

}  // namespace t4r_fast
