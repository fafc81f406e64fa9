// CUDA's words for a C++ compiler: kernels of csrc/cuda run on the CPU, one fiber per thread.
//
// Blocks run one after another, in a random order; in a block the warps, and in a warp the lanes,
// take turns in a random order. A lane runs until it waits (or at an atomic, now and then), so a
// missing barrier lets others read what is not written yet: shared memory starts as NaN, integers
// as huge ones. T4R_FAST_SHUFFLE=<number> is the seed. Errors are C++ exceptions: a barrier that
// not all threads reach, a shuffle from a lane that takes no part, limits of the device, trap.
//
// Not modelled: blocks at the same time (a kernel may not wait for another block), weak memory
// order, speed. Reads and writes out of bounds are AddressSanitizer's to find (build.py builds
// both ways); the races of one warp's lanes between two barriers are compute-sanitizer's.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using cudaStream_t = void*;

namespace cuda_on_cpu {

struct Site {
  const char* file;
  int line;
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
};

// Runs body once for each thread of the shape. One launch at a time in a process.
void run(const char* kernel, const Shape& shape, const std::function<void()>& body);

void block_barrier(Site site);

enum class Exchange { kBarrier, kShuffle, kVote, kMatch };
struct Answer {
  uint64_t value;
  unsigned lanes;
};
// Waits for all lanes of the mask. kShuffle: value of lane `source`; kVote: lanes with a value
// other than 0; kMatch: lanes with this lane's value.
Answer exchange(Exchange kind, unsigned mask, uint64_t value, int source, Site site);

int lane();

// Others may run here.
void atomic_point();

// Memory of the block that runs, one allocation per key; the first thread that asks makes it.
void* shared_memory(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

template <typename Key>
inline char key_of = 0;

// The lambda of each call is a type of its own, also in each instance of a template.
template <typename T, typename Key>
T& shared(Key) {
  return *static_cast<T*>(shared_memory(&key_of<Key>, sizeof(T), alignof(T)));
}

// CUDA converts arguments to the kernel's parameters once; threads get copies.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert(sizeof(std::tuple<Parameters...>) <= 4096, "kernel parameters are at most 4 KiB");
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  run(name, {grid, block, shared_bytes}, [&] { std::apply(kernel, values); });
}

template <typename T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T shuffled(unsigned mask, T value, int source, Site site) {
  const uint64_t bits = exchange(Exchange::kShuffle, mask, bits_of(value), source, site).value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T changed(T* address, T value) {
  // Sums in the order of arrival: floats would give other bits each time.
  static_assert(std::is_integral_v<T>, "atomics are for integers here");
  return std::exchange(*address, value);
}

}  // namespace cuda_on_cpu

// The variables of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The place of a call, for messages and to tell one barrier from another.
#define CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SITE (::cuda_on_cpu::Site{file, line})

inline void __syncthreads(CALL_SITE) {
  ::cuda_on_cpu::block_barrier(SITE);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, CALL_SITE) {
  ::cuda_on_cpu::exchange(::cuda_on_cpu::Exchange::kBarrier, mask, 0, 0, SITE);
}

// Lanes in groups of `width`, a power of two. A source outside the group is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CALL_SITE) {
  const int group = ::cuda_on_cpu::lane() & ~(width - 1);
  return ::cuda_on_cpu::shuffled(mask, value, group + (source & (width - 1)), SITE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CALL_SITE) {
  const int lane = ::cuda_on_cpu::lane(), source = lane ^ bits;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return ::cuda_on_cpu::shuffled(mask, value, inside ? source : lane, SITE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CALL_SITE) {
  const int lane = ::cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return ::cuda_on_cpu::shuffled(mask, value, inside ? source : lane, SITE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CALL_SITE) {
  const int lane = ::cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return ::cuda_on_cpu::shuffled(mask, value, inside ? source : lane, SITE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CALL_SITE) {
  const auto kind = ::cuda_on_cpu::Exchange::kVote;
  return ::cuda_on_cpu::exchange(kind, mask, predicate != 0, 0, SITE).lanes;
}
inline int __any_sync(unsigned mask, int predicate, CALL_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CALL_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CALL_SITE) {
  const auto kind = ::cuda_on_cpu::Exchange::kMatch;
  return ::cuda_on_cpu::exchange(kind, mask, ::cuda_on_cpu::bits_of(value), 0, SITE).lanes;
}

#undef CALL_SITE
#undef SITE

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  ::cuda_on_cpu::atomic_point();
  return ::cuda_on_cpu::changed(address, static_cast<T>(*address + value));
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  ::cuda_on_cpu::atomic_point();
  return ::cuda_on_cpu::changed(address, *address < value ? value : *address);
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  ::cuda_on_cpu::atomic_point();
  return ::cuda_on_cpu::changed(address, value < *address ? value : *address);
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  ::cuda_on_cpu::atomic_point();
  return ::cuda_on_cpu::changed(address, static_cast<T>(*address | value));
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  ::cuda_on_cpu::atomic_point();
  return ::cuda_on_cpu::changed(address, value);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  ::cuda_on_cpu::atomic_point();
  return ::cuda_on_cpu::changed(address, *address == expected ? value : *address);
}
inline void __threadfence() {
  ::cuda_on_cpu::atomic_point();
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
inline unsigned __brev(unsigned bits) {
  unsigned turned = 0;
  for (int i = 0; i < 32; ++i) turned |= (bits >> i & 1u) << (31 - i);
  return turned;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}

template <typename T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
