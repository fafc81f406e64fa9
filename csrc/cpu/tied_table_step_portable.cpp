#include "simd_portable.h"
// The vector unit comes first.
#include "tied_table_step_kernel.h"

namespace t4r_fast {

extern const TableKernels<float> tied_table_step_f32_portable;
extern const TableKernels<double> tied_table_step_f64_portable;
const TableKernels<float> tied_table_step_f32_portable = table_kernels<F32>();
const TableKernels<double> tied_table_step_f64_portable = table_kernels<F64>();

}  // namespace t4r_fast
