// Runs the loops of host_floors.h in threads of their own and takes their time.

#include "host_measure.h"

#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace t4r_fast {
namespace {

// Per thread, in floats: 128 MiB, several times the last-level cache of a core.
constexpr size_t kBig = size_t{32} << 20;
constexpr size_t kSmall = 4096;  // fits the first-level cache
constexpr size_t kRow = 64;
constexpr size_t kRowsPerBlock = 1 << 14;
constexpr int kWindows = 3;

double now(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Sums rows of 256 bytes at random places, fetched ahead.
void gather(const float* x, uint64_t* state, float* sink) {
  constexpr uint64_t kRows = kBig / kRow;
  constexpr size_t kAhead = 16;
  const float* row[kAhead] = {};
  float total[4] = {};
  for (size_t i = 0; i < kRowsPerBlock + kAhead; ++i) {
    if (const float* r = row[i % kAhead]) {
      for (size_t k = 0; k < kRow; k += 4) {
        for (size_t j = 0; j < 4; ++j) total[j] += r[k + j];
      }
    }
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    const float* next = x + ((*state >> 33) % kRows) * kRow;
    for (size_t k = 0; k < kRow; k += 16) __builtin_prefetch(next + k);
    row[i % kAhead] = next;
  }
  *sink += total[0] + total[1] + total[2] + total[3];
}

// One thread's memory and loops. Each loop does one block of work and returns how much that was.
class Worker {
 public:
  Worker(const FloorKernels& kernels, uint64_t seed)
      : kernels_(kernels), big_(kBig, 1.0f), small_(kSmall), state_(seed) {
    for (size_t i = 0; i < kSmall; ++i) small_[i] = -static_cast<float>(i % 64) / 8;
  }

  double fma() {
    float sink[3] = {1.0f, 0.5f, 0.5f};
    const double flop = kernels_.multiply_add(20000, sink);
    result = sink[0];
    return flop;
  }
  double exp() {
    float sink = 0;
    for (int i = 0; i < 50; ++i) kernels_.exp_sum(small_.data(), kSmall, &sink);
    result = sink;
    return 50.0 * kSmall;
  }
  double read() {
    float sink = 0;
    kernels_.read(big_.data(), kBig, &sink);
    result = sink;
    return 4.0 * kBig;
  }
  double copy() {
    std::memcpy(big_.data(), big_.data() + kBig / 2, 2 * kBig);
    return 4.0 * kBig;
  }
  double gather() {
    float sink = 0;
    t4r_fast::gather(big_.data(), &state_, &sink);
    result = sink;
    return 4.0 * kRow * kRowsPerBlock;
  }

  volatile float result = 0;

 private:
  const FloorKernels& kernels_;
  std::vector<float> big_, small_;
  uint64_t state_;
};

using Loop = double (Worker::*)();

using Workers = std::vector<std::unique_ptr<Worker>>;

// Made in threads of their own, so that each has its memory near.
Workers make_workers(const FloorKernels& kernels, int count) {
  Workers workers(static_cast<size_t>(count));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < workers.size(); ++i) {
    threads.emplace_back([&, i] { workers[i] = std::make_unique<Worker>(kernels, 977 * i); });
  }
  for (std::thread& thread : threads) thread.join();
  return workers;
}

Rate window(const Workers& workers, Loop loop, double seconds) {
  std::vector<Rate> rates(workers.size());
  std::atomic<size_t> ready{0};
  const auto run = [&](size_t i) {
    ((*workers[i]).*loop)();
    ++ready;
    while (ready < workers.size()) std::this_thread::yield();
    const double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
    double work = 0, spent = 0;
    do {
      work += ((*workers[i]).*loop)();
      spent = now(CLOCK_MONOTONIC) - wall;
    } while (spent < seconds);
    rates[i] = {1e-9 * work / (now(CLOCK_THREAD_CPUTIME_ID) - cpu), 1e-9 * work / spent};
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < workers.size(); ++i) threads.emplace_back(run, i);
  for (std::thread& thread : threads) thread.join();
  Rate total;
  for (const Rate& rate : rates) {
    total.by_cpu += rate.by_cpu;
    total.by_wall += rate.by_wall;
  }
  return total;
}

}  // namespace

std::map<std::string, Rate> measure_floors(const FloorKernels& kernels, int threads,
                                           double seconds) {
  const Workers workers = make_workers(kernels, threads);
  const std::map<std::string, Loop> loops{{"fma", &Worker::fma},
                                          {"exp", &Worker::exp},
                                          {"read", &Worker::read},
                                          {"copy", &Worker::copy},
                                          {"gather", &Worker::gather}};
  std::map<std::string, Rate> best;
  for (const auto& [name, loop] : loops) {
    for (int w = 0; w < kWindows; ++w) {
      const Rate rate = window(workers, loop, seconds);
      best[name].by_cpu = rate.by_cpu > best[name].by_cpu ? rate.by_cpu : best[name].by_cpu;
      best[name].by_wall = rate.by_wall > best[name].by_wall ? rate.by_wall : best[name].by_wall;
    }
  }
  return best;
}

}  // namespace t4r_fast
