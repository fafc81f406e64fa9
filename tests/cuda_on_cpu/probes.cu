// Small kernels, right ones and wrong ones, by which tests/test_cuda_on_cpu.py tests the engine.
#include <map>
#include <string>

#include "../../csrc/cuda/look_back.cuh"
#include "cuda_on_cpu.h"

namespace {

using cuda_on_cpu::launch;
using cuda_on_cpu::shared;

struct Data {
  float* x;
  float* out;
  int n;
};

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kBlock = 128;

// The sum of a block's share by shuffles, then by shared memory.
template <bool kBarrier>
__global__ void sum_kernel(Data d) {
  auto& parts = shared<float[kBlock / 32]>([] {});
  float sum = 0;
  for (int i = blockIdx.x * kBlock + threadIdx.x; i < d.n; i += gridDim.x * kBlock) sum += d.x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  if constexpr (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (float part : parts) sum += part;
    d.out[blockIdx.x] = sum;
  }
}

// The sum over rounds of x[kBlock - 1 - i] + round, through one buffer for all rounds.
template <bool kBarrier>
__global__ void reverse_kernel(Data d) {
  auto& buffer = shared<float[kBlock]>([] {});
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    buffer[i] = d.x[i] + static_cast<float>(round);
    __syncthreads();
    sum += buffer[kBlock - 1 - i];
    if constexpr (kBarrier) __syncthreads();
  }
  d.out[i] = sum;
}

// The same inside a warp.
template <bool kBarrier>
__global__ void reverse_warp_kernel(Data d) {
  auto& buffer = shared<float[32]>([] {});
  buffer[threadIdx.x] = d.x[threadIdx.x];
  if constexpr (kBarrier) __syncwarp();
  d.out[threadIdx.x] = buffer[31 - threadIdx.x];
}

// All the collectives, on half warps where they take a width. out[i] counts what is right.
__global__ void collectives_kernel(Data d) {
  const int i = threadIdx.x, half = i & 16;
  const unsigned odd = 0xAAAAAAAAu;
  int right = 0;
  right += __shfl_sync(kAll, 2 * i, 7, 16) == 2 * (half + 7);
  right += __shfl_up_sync(kAll, i, 3, 16) == ((i & 15) >= 3 ? i - 3 : i);
  right += __shfl_down_sync(kAll, i, 3, 16) == ((i & 15) < 13 ? i + 3 : i);
  right += __shfl_xor_sync(kAll, static_cast<double>(i), 5) == static_cast<double>(i ^ 5);
  right += __ballot_sync(kAll, i % 2) == odd;
  right += __any_sync(kAll, i == 9) == 1;
  right += __all_sync(kAll, i != 9) == 0;
  right += __match_any_sync(kAll, i % 2 ? -1LL : 1LL) == (i % 2 ? odd : ~odd);
  if (i % 2) right += __ballot_sync(odd, 1) == odd;  // lanes of the other half are elsewhere
  if (i % 2 == 0) right += __all_sync(~odd, 1) == 1;
  __syncwarp();
  d.out[i] = static_cast<float>(right);
}

// Each thread of all blocks adds one; out[1] is the largest block number.
__global__ void atomics_kernel(Data d) {
  int* counters = reinterpret_cast<int*>(d.out);
  atomicAdd(&counters[0], 1);
  atomicMax(&counters[1], static_cast<int>(blockIdx.x));
}

// Without atomics an addition is lost when another thread comes between read and write.
__global__ void lost_update_kernel(Data d) {
  int* counters = reinterpret_cast<int*>(d.out);
  const int before = counters[0];
  __threadfence();
  counters[0] = before + 1;
}

__global__ void order_kernel(Data d) {
  int* next = reinterpret_cast<int*>(d.out);
  d.out[1 + atomicAdd(next, 1)] = static_cast<float>(blockIdx.x * kBlock + threadIdx.x);
}

// Block b looks back over b blocks that have left a count each, of i + 1 for block i; block
// b / 2 knows the count up to its end. The engine runs blocks one after another, so no op
// meets blocks that do not.
__global__ void look_back_kernel(Data d) {
  auto& words = shared<unsigned long long[kBlock]>([] {});
  const int block = static_cast<int>(blockIdx.x);
  for (int i = threadIdx.x; i < kBlock; i += 32) {
    const int64_t own = i + 1, up_to_end = own * (own + 1) / 2;
    const bool knows = i == 0 || i == block / 2;
    words[i] = 0;
    if (i < block) {
      t4r_fast::leave(&words[i], knows ? up_to_end : own,
                      knows ? t4r_fast::kUpToEnd : t4r_fast::kOwn);
    }
  }
  __syncwarp();
  const int64_t before = t4r_fast::look_back(words, blockIdx.x, 1000);
  __syncwarp();
  const bool left =
      words[block] ==
      static_cast<unsigned long long>(before + 1000) * t4r_fast::kBlockStates + t4r_fast::kUpToEnd;
  if (threadIdx.x == 0) d.out[block] = static_cast<float>(left ? before : -1);
}

__global__ void unwritten_shared_kernel(Data d) {
  auto& floats = shared<float[4]>([] {});
  auto& integers = shared<int[4]>([] {});
  d.out[0] = floats[1];
  d.out[1] = static_cast<float>(integers[1]);
}

// Dynamic shared memory of kBlock floats.
__global__ void dynamic_kernel(Data d) {
  float* buffer = static_cast<float*>(cuda_on_cpu::dynamic_shared_memory());
  buffer[threadIdx.x] = d.x[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = buffer[kBlock - 1 - threadIdx.x];
}

__global__ void divergent_places_kernel(Data d) {
  if (threadIdx.x < 40) {
    __syncthreads();
    d.out[threadIdx.x] = 0;
  } else {
    __syncthreads();
  }
}
__global__ void divergent_return_kernel(Data d) {
  if (threadIdx.x == 70) return;
  __syncthreads();
  d.out[threadIdx.x] = 0;
}
__global__ void divergent_warp_kernel(Data d) {
  if (threadIdx.x == 3)
    __syncthreads();
  else
    __syncwarp();
  d.out[threadIdx.x] = 0;
}
__global__ void shuffle_from_nobody_kernel(Data d) {
  if (threadIdx.x < 8) d.out[threadIdx.x] = __shfl_sync(0xFFu, d.x[threadIdx.x], 8);
}
__global__ void not_in_mask_kernel(Data) {
  __syncwarp(0xFFu);
}
__global__ void throwing_kernel(Data d) {
  __syncthreads();
  if (d.x[threadIdx.x] == 5.0f) throw std::runtime_error("five is too many");
}
__global__ void large_shared_kernel(Data d) {
  auto& a = shared<float[8192]>([] {});
  auto& b = shared<float[8192]>([] {});
  d.out[0] = a[0] + b[0];
}

// Of tensors and shared memory, one element too far.
__global__ void read_after_kernel(Data d) {
  d.out[0] = d.x[d.n];
}
__global__ void read_before_kernel(Data d) {
  d.out[0] = d.x[-1];
}
__global__ void write_after_kernel(Data d) {
  d.out[d.n] = 1;
}
__global__ void shared_after_kernel(Data d) {
  auto& buffer = shared<float[kBlock]>([] {});
  buffer[threadIdx.x + d.n - kBlock + 1] = 1;
}
__global__ void dynamic_after_kernel(Data d) {
  static_cast<float*>(cuda_on_cpu::dynamic_shared_memory())[threadIdx.x + d.n - kBlock + 1] = 1;
}
__global__ void misaligned_kernel(Data d) {
  const float4 four = *reinterpret_cast<const float4*>(d.x + 1);
  d.out[0] = four.x;
}

struct Probe {
  void (*kernel)(Data);
  int blocks, threads;
  size_t shared_bytes = 0;
};
constexpr size_t kDynamic = kBlock * sizeof(float);

const std::map<std::string, Probe> kProbes = {
    {"sum", {sum_kernel<true>, 5, kBlock}},
    {"sum without barrier", {sum_kernel<false>, 5, kBlock}},
    {"reverse", {reverse_kernel<true>, 1, kBlock}},
    {"reverse without barrier", {reverse_kernel<false>, 1, kBlock}},
    {"reverse warp", {reverse_warp_kernel<true>, 1, 32}},
    {"reverse warp without barrier", {reverse_warp_kernel<false>, 1, 32}},
    {"collectives", {collectives_kernel, 1, 32}},
    {"atomics", {atomics_kernel, 7, kBlock}},
    {"lost update", {lost_update_kernel, 1, kBlock}},
    {"order", {order_kernel, 3, kBlock}},
    {"look back", {look_back_kernel, kBlock, 32}},
    {"unwritten shared", {unwritten_shared_kernel, 1, 1}},
    {"dynamic", {dynamic_kernel, 1, kBlock, kDynamic}},
    {"divergent places", {divergent_places_kernel, 1, kBlock}},
    {"divergent return", {divergent_return_kernel, 1, kBlock}},
    {"divergent warp", {divergent_warp_kernel, 1, kBlock}},
    {"shuffle from nobody", {shuffle_from_nobody_kernel, 1, 32}},
    {"not in mask", {not_in_mask_kernel, 1, 32}},
    {"throwing", {throwing_kernel, 2, kBlock}},
    {"large shared", {large_shared_kernel, 1, 1}},
    {"large block", {order_kernel, 1, 1025}},
    {"no grid", {order_kernel, 0, kBlock}},
    {"no shared bytes", {dynamic_kernel, 1, kBlock}},
    {"read after", {read_after_kernel, 1, 1}},
    {"read before", {read_before_kernel, 1, 1}},
    {"write after", {write_after_kernel, 1, 1}},
    {"shared after", {shared_after_kernel, 1, kBlock}},
    {"dynamic after", {dynamic_after_kernel, 1, kBlock, kDynamic}},
    {"misaligned", {misaligned_kernel, 1, 1}},
};

}  // namespace

// "" or the message of the error. Valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* run_probe(const char* name, float* x,
                                                                        float* out, int n) {
  static std::string message;
  message.clear();
  try {
    const Probe& probe = kProbes.at(name);
    launch(name, probe.blocks, probe.threads, probe.shared_bytes, probe.kernel, Data{x, out, n});
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
