#include "simd_avx512.h"
// The vector unit comes first.
#include "tied_table_step_kernel.h"

namespace t4r_fast {

extern const TableKernels<float> tied_table_step_f32_avx512;
extern const TableKernels<double> tied_table_step_f64_avx512;
const TableKernels<float> tied_table_step_f32_avx512 = table_kernels<F32>();
const TableKernels<double> tied_table_step_f64_avx512 = table_kernels<F64>();

}  // namespace t4r_fast
