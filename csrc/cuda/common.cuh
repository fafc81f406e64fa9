// What every CUDA op needs, for nvcc and for the C++ compiler that builds the same files for the
// tests without a GPU (tests/cuda_on_cpu). There kernels run on the CPU, in another namespace.
//
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...);  (kernel<A, B>) in parentheses
//   SHARED(name, float[32][33]);         a variable of the block
//   DYNAMIC_SHARED(name, float);         a pointer to the launch's shared bytes
//   DEVICE_CHECK(condition, "message");  in a kernel: stops with the message
//   REGISTER_OPS(m) { m.impl("<op>_fwd", TORCH_BOX(&<op>_fwd_cuda)); }
//
// Kernels and device functions are in an unnamed namespace. Atomics are for integers only.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../check.h"
#include "../host_device.h"

#ifdef __CUDACC__

// Weak: a torch without CUDA has no such function, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line,
                                        const char* function, size_t char_size);

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)          \
  do {                                                                  \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::t4r_fast::check_launch(#kernel);                                  \
  } while (false)
#define SHARED(name, ...) __shared__ t4r_fast::Type<__VA_ARGS__> name
#define DYNAMIC_SHARED(name, ...)                          \
  extern __shared__ uint4 t4r_fast_dynamic_shared_bytes[]; \
  __VA_ARGS__* name = reinterpret_cast<__VA_ARGS__*>(t4r_fast_dynamic_shared_bytes)
// As assert(), with a message of its own. Values would need printf, and that a stack frame.
#define DEVICE_CHECK(condition, message)                                      \
  do {                                                                        \
    if (!(condition)) __assertfail(message, __FILE__, __LINE__, __func__, 1); \
  } while (false)
#define REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CUDA, m)

#else

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                      \
  do {                                                                              \
    static_cast<void>(stream);                                                      \
    ::cuda_on_cpu::launch(#kernel, grid, block, shared_bytes, kernel, __VA_ARGS__); \
  } while (false)
#define SHARED(name, ...) auto& name = ::cuda_on_cpu::shared<__VA_ARGS__>([] {})
#define DYNAMIC_SHARED(name, ...) \
  __VA_ARGS__* name = static_cast<__VA_ARGS__*>(::cuda_on_cpu::dynamic_shared_memory())
#define DEVICE_CHECK(condition, message)                   \
  do {                                                     \
    if (!(condition)) throw ::std::runtime_error(message); \
  } while (false)
#define REGISTER_OPS(m) STABLE_TORCH_LIBRARY_IMPL(t4r_fast_emulated, CPU, m)

#endif

namespace t4r_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
using Type = T;

constexpr unsigned kWarp = 32, kAllLanes = 0xFFFFFFFFu;

#ifdef __CUDACC__
// The device of a tensor is the current one as long as this lives.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  CHECK(aoti_torch_get_current_cuda_stream != nullptr, "t4r_fast: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  CHECK(error == cudaSuccess, "t4r_fast: ", kernel,
        " was not launched: ", cudaGetErrorString(error));
}
#else
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(const Tensor&) {
  return nullptr;
}
#endif

// A kernel strides over what is left: small for the tests, so that theirs do.
#ifdef __CUDACC__
constexpr int64_t kMostBlocks = 4096;
#else
constexpr int64_t kMostBlocks = 3;
#endif

// Blocks for n things, at least one: a grid of none is an error.
inline unsigned grid_for(int64_t n, int64_t per_block, int64_t most = kMostBlocks) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace t4r_fast
