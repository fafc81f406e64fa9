#include "simd_avx512.h"
// The vector unit comes first.
#include "session_attention_kernel.h"

namespace t4r_fast {

extern const AttentionKernels<float> session_attention_f32_avx512;
extern const AttentionKernels<double> session_attention_f64_avx512;
const AttentionKernels<float> session_attention_f32_avx512 = attention_kernels<F32>();
const AttentionKernels<double> session_attention_f64_avx512 = attention_kernels<F64>();

}  // namespace t4r_fast
