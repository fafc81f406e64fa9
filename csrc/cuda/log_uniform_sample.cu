// log_uniform_sample: the inverse distribution function in closed form; nothing depends on V.
//
// Different ids (`unique`) are found by one block, round by round: every thread draws two, a hash
// table keeps of equal ones the first draw, and a scan in the order of the draws takes what is new.
// The table's words hold a class and when in the round it was drawn, 0 if in an earlier round: what
// stands there after a round does not depend on who came first. n near V takes many rounds.

#include <cmath>
#include <tuple>

#include "seed.cuh"

namespace t4r_fast {
namespace {

constexpr const char* kOp = "log_uniform_sample";
constexpr int kPairThreads = 128;
constexpr int kThreads = 1024;  // of the block that finds different ids
constexpr int kDraws = 2;       // of a thread in a round, from one Philox counter
constexpr int kRound = kThreads * kDraws;
constexpr int64_t kMostPairs = int64_t{1} << 32;  // of a Philox counter's word

// A word of the table: a class below 2**40, and the place of its draw.
constexpr int kPlaceBits = 24;
constexpr int64_t kMostClasses = int64_t{1} << (64 - kPlaceBits);
constexpr unsigned long long kPlaces = (1ull << kPlaceBits) - 1, kEmpty = ~0ull;
static_assert(kRound < kPlaces, "the last place stands for an empty word");

// What is drawn from.
struct Range {
  int64_t size, low;
  double log_size;
};

__device__ void draw_pair(const Seed& seed, const Range& range, int64_t pair, int64_t* classes) {
  double u[kDraws];
  unit_pair(seed, kSample, 0, static_cast<uint32_t>(pair), u);
  for (int k = 0; k < kDraws; ++k) classes[k] = log_uniform(u[k], range.size, range.log_size);
}

__device__ double probability(int64_t c, const Range& range) {
  return log1p(1.0 / (static_cast<double>(c) + 1.0)) / range.log_size;
}

__global__ void __launch_bounds__(kPairThreads)
    log_uniform_sample_fwd_kernel(SeedTensor seed_tensor, Range range, int64_t n, int64_t* ids,
                                  float* log_prob, int64_t* tries) {
  const Seed seed = seed_tensor.read();
  const int64_t pair = int64_t{blockIdx.x} * kPairThreads + threadIdx.x;
  if (pair == 0) *tries = n;
  int64_t classes[kDraws];
  draw_pair(seed, range, pair, classes);
  for (int k = 0; k < kDraws && kDraws * pair + k < n; ++k) {
    ids[kDraws * pair + k] = classes[k] + range.low;
    log_prob[kDraws * pair + k] = static_cast<float>(log(probability(classes[k], range)));
  }
}

// Notes that class c was drawn at `place` of the round; gives its slot.
__device__ uint64_t note(unsigned long long* table, uint64_t last_slot, int64_t c, unsigned place) {
  const unsigned long long mine = static_cast<unsigned long long>(c) << kPlaceBits | place;
  uint64_t slot = (static_cast<uint64_t>(c) * 0x9E3779B97F4A7C15u >> 20) & last_slot;
  while (true) {
    const unsigned long long there = atomicCAS(table + slot, kEmpty, mine);
    if (there == kEmpty) return slot;
    if (there >> kPlaceBits == mine >> kPlaceBits) {
      atomicMin(table + slot, mine);
      return slot;
    }
    slot = (slot + 1) & last_slot;
  }
}

// How many of the block's `own` come before the calling thread's; `total` gets all of them. Between
// two calls is a barrier.
__device__ int before_thread(int own, int* total) {
  SHARED(sums, int[kWarp]);
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = threadIdx.x / kWarp;
  int up_to = own;
  for (int lanes = 1; lanes < static_cast<int>(kWarp); lanes *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, lanes);
    if (lane >= lanes) up_to += other;
  }
  if (lane == kWarp - 1) sums[warp] = up_to;
  __syncthreads();
  // every warp sums the warps' sums: 32 of them
  static_assert(kThreads == kWarp * kWarp);
  int warps = sums[lane];
  for (int lanes = 1; lanes < static_cast<int>(kWarp); lanes *= 2) {
    const int other = __shfl_up_sync(kAllLanes, warps, lanes);
    if (lane >= lanes) warps += other;
  }
  *total = __shfl_sync(kAllLanes, warps, kWarp - 1);
  const int before = __shfl_sync(kAllLanes, warps, (warp + kWarp - 1) % kWarp);
  return (warp == 0 ? 0 : before) + up_to - own;
}

// One block alone: without the 1, ptxas spills on sm_100 to let a second one onto the
// multiprocessor.
__global__ void __launch_bounds__(kThreads, 1)
    log_uniform_sample_unique_fwd_kernel(SeedTensor seed_tensor, Range range, int64_t n,
                                         unsigned long long* table, uint64_t slots, int64_t* ids,
                                         float* log_prob, int64_t* tries) {
  SHARED(drawn, int64_t);  // draws until the n-th class
  const Seed seed = seed_tensor.read();
  for (uint64_t slot = threadIdx.x; slot < slots; slot += kThreads) table[slot] = kEmpty;
  if (threadIdx.x == 0 && n == 0) drawn = 0;
  __syncthreads();
  int64_t found = 0;
  for (int64_t first = 0; found < n; first += kThreads) {
    DEVICE_CHECK(first < kMostPairs,
                 "log_uniform_sample: unique found fewer than n in 2**33 draws");
    int64_t classes[kDraws];
    uint64_t slot[kDraws];
    draw_pair(seed, range, first + threadIdx.x, classes);
    const unsigned place = kDraws * threadIdx.x + 1;
    for (int k = 0; k < kDraws; ++k) slot[k] = note(table, slots - 1, classes[k], place + k);
    __syncthreads();
    bool fresh[kDraws];
    for (int k = 0; k < kDraws; ++k) fresh[k] = (table[slot[k]] & kPlaces) == place + k;
    int total;
    int64_t at = found + before_thread(fresh[0] + fresh[1], &total);
    for (int k = 0; k < kDraws; ++k) {
      if (!fresh[k]) continue;
      table[slot[k]] &= ~kPlaces;  // of an earlier round from now on
      if (at < n) ids[at] = classes[k];
      if (at == n - 1) drawn = kDraws * (first + threadIdx.x) + k + 1;
      ++at;
    }
    found += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) *tries = drawn;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const int64_t c = ids[i];
    const double q = probability(c, range);
    // the chance that so many draws hold c
    const double p = -expm1(static_cast<double>(drawn) * log1p(-q));
    ids[i] = c + range.low;
    log_prob[i] = static_cast<float>(log(p));
  }
}

std::tuple<Tensor, Tensor, Tensor> log_uniform_sample_fwd_cuda(const Tensor& seed_tensor, int64_t n,
                                                               int64_t size, int64_t low,
                                                               double log_size, bool unique) {
  const SeedTensor seed(kOp, seed_tensor, seed_tensor.get_device_index());
  CHECK(n >= 0 && size > 0 && size <= kMostClasses, kOp, ": n must be >= 0 and size from 1 to ",
        kMostClasses, "; got ", n, ", ", size);
  CHECK(!unique || n <= size, kOp, ": n must be at most ", size, " with unique");
  const DeviceGuard guard(seed_tensor.get_device_index());
  const cudaStream_t stream = current_stream(seed_tensor);
  Tensor ids = torch::stable::new_empty(seed_tensor, {n});
  Tensor log_prob = torch::stable::new_empty(seed_tensor, {n}, ScalarType::Float);
  Tensor tries = torch::stable::new_empty(seed_tensor, {});
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  float* out = log_prob.mutable_data_ptr<float>();
  int64_t* drawn = tries.mutable_data_ptr<int64_t>();
  const Range range{size, low, log_size};
  if (!unique) {
    const int64_t pairs = n / 2 + n % 2;
    CHECK(pairs <= kMostPairs, kOp, ": n must be at most 2**33; got ", n);
    const unsigned blocks = grid_for(pairs, kPairThreads, kMostPairs);
    LAUNCH(log_uniform_sample_fwd_kernel, blocks, kPairThreads, 0, stream, seed, range, n, id, out,
           drawn);
    return {ids, log_prob, tries};
  }
  int64_t slots = 1;  // at most half full, also with what the last round finds beyond n
  while (slots < 2 * (n + kRound)) slots *= 2;
  Tensor table = torch::stable::new_empty(seed_tensor, {slots});
  LAUNCH(log_uniform_sample_unique_fwd_kernel, 1, kThreads, 0, stream, seed, range, n,
         reinterpret_cast<unsigned long long*>(table.mutable_data_ptr<int64_t>()),
         static_cast<uint64_t>(slots), id, out, drawn);
  return {ids, log_prob, tries};
}

}  // namespace
}  // namespace t4r_fast

REGISTER_OPS(m) {
  m.impl("log_uniform_sample_fwd", TORCH_BOX(&t4r_fast::log_uniform_sample_fwd_cuda));
}
