// The fibers behind cuda_on_cpu.h: who runs next, who waits for whom, and what is wrong with that.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must preserve (System V ABI), stores the stack's top and takes the other one.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = size_t{1} << 17, kPage = 4096;
constexpr unsigned kMaxBlock = 1024, kMaxGridYZ = 65535;
constexpr size_t kMaxShared = size_t{48} << 10;  // without asking the driver for more
constexpr size_t kSharedAlignment = __STDCPP_DEFAULT_NEW_ALIGNMENT__;
// NaN as float, double, half or bfloat16, huge as an integer of 16, 32 or 64 bits.
constexpr uint16_t kPoison = 0x7FFB;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  unsigned below(unsigned n) { return static_cast<unsigned>((next() >> 32) * n >> 32); }
  bool chance(unsigned of_256) { return below(256) < of_256; }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[below(static_cast<unsigned>(i))]);
    }
  }

 private:
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

enum class State { kReady, kAtBlockBarrier, kAtExchange, kReturned };

struct Fiber {
  uint3 index;
  State state;
  void* top;  // of its stack, while it does not run
  Site site;  // where it waits
  Exchange kind;
  unsigned mask;
  uint64_t value;
  int source;
  Answer answer;
};

using Bytes = std::unique_ptr<std::byte[]>;

Bytes poisoned(size_t bytes) {
  Bytes data(new std::byte[bytes]);
  for (size_t i = 0; i < bytes; ++i) data[i] = std::byte(i % 2 ? kPoison >> 8 : kPoison & 0xFF);
  return data;
}

struct SharedMemory {
  const void* key;
  size_t bytes;
  Bytes data;
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  throw std::runtime_error(out.str());
}

// Stacks of fibers, kept from launch to launch; below each is a page that cannot be touched.
class Stacks {
 public:
  std::byte* bottom(size_t i) {
    while (bottoms_.size() <= i) {
      void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) fail("no memory for a fiber's stack");
      mprotect(memory, kPage, PROT_NONE);
      bottoms_.push_back(static_cast<std::byte*>(memory) + kPage);
    }
    return bottoms_[i];
  }

 private:
  std::vector<std::byte*> bottoms_;
};

struct Engine {
  Random random{0};
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  Shape shape{};
  std::vector<Fiber> fibers;
  std::vector<SharedMemory> shared;
  Bytes dynamic_shared;
  Stacks stacks;
  Fiber* current = nullptr;
  void* scheduler_top = nullptr;
  std::exception_ptr error;
  unsigned stay = 0;  // of 256: the chance that the same warp goes on
#ifdef __SANITIZE_ADDRESS__
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif

  int number(const Fiber& fiber) const { return static_cast<int>(&fiber - fibers.data()); }
  int warps() const { return (static_cast<int>(fibers.size()) + kWarp - 1) / kWarp; }
  Fiber* warp_of(const Fiber& fiber) { return &fibers[number(fiber) / kWarp * kWarp]; }
  int lanes_of(const Fiber* warp) const {
    return std::min<int>(kWarp, fibers.size() - number(*warp));
  }

  void run_block();
  void start(Fiber& fiber);
  void resume(Fiber& fiber);
  void leave();
  bool step(int warp);
  void finish_exchanges(Fiber* warp);
  void finish_exchange(Fiber* warp, unsigned mask);
  bool finish_barrier();
  [[noreturn]] void stuck();
};

Engine engine;
std::mutex one_launch;

void* first_top(std::byte* bottom, void (*entry)()) {
  void** top = reinterpret_cast<void**>(bottom + kStack);
  *--top = nullptr;  // a return address, so that the entry finds its stack aligned as by a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}

void enter_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_bottom, &engine.scheduler_size);
#endif
  try {
    (*engine.body)();
  } catch (...) {
    if (!engine.error) engine.error = std::current_exception();
  }
  engine.current->state = State::kReturned;
  engine.leave();
  std::abort();  // a fiber that returned is not resumed
}

void Engine::start(Fiber& fiber) {
  std::byte* bottom = stacks.bottom(static_cast<size_t>(number(fiber)));
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom, kStack);  // what an error left half way
#endif
  fiber.top = first_top(bottom, enter_fiber);
  fiber.state = State::kReady;
}

void Engine::resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stacks.bottom(static_cast<size_t>(number(fiber))), kStack);
  cuda_on_cpu_switch(&scheduler_top, fiber.top);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  cuda_on_cpu_switch(&scheduler_top, fiber.top);
#endif
  if (error) std::rethrow_exception(std::exchange(error, nullptr));
}

void Engine::leave() {
  Fiber& fiber = *current;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  const bool last = fiber.state == State::kReturned;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_bottom, scheduler_size);
  cuda_on_cpu_switch(&fiber.top, scheduler_top);
  __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#else
  cuda_on_cpu_switch(&fiber.top, scheduler_top);
#endif
}

std::string where(const Fiber& fiber) {
  std::ostringstream out;
  out << "thread (" << fiber.index.x << ", " << fiber.index.y << ", " << fiber.index.z << ") ";
  switch (fiber.state) {
    case State::kReturned:
      out << "has returned";
      break;
    case State::kReady:
      out << "runs";
      break;
    default:
      out << "waits for its " << (fiber.state == State::kAtExchange ? "warp" : "block") << " at "
          << fiber.site.file << ":" << fiber.site.line;
  }
  return out.str();
}

bool same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

// All lanes of the warp that can run, each until it waits. False if there is none.
bool Engine::step(int warp) {
  std::vector<int> order(static_cast<size_t>(lanes_of(&fibers[warp * kWarp])));
  std::iota(order.begin(), order.end(), warp * kWarp);
  random.shuffle(order);
  bool ran = false;
  for (int i : order) {
    if (fibers[i].state != State::kReady) continue;
    resume(fibers[i]);
    ran = true;
  }
  if (ran) finish_exchanges(&fibers[warp * kWarp]);
  return ran;
}

void Engine::finish_exchanges(Fiber* warp) {
  for (int i = 0; i < lanes_of(warp); ++i) {
    if (warp[i].state != State::kAtExchange) continue;
    bool complete = true;
    for (int j = 0; j < lanes_of(warp); ++j) {
      if (!(warp[i].mask >> j & 1u) || warp[j].state == State::kReturned) continue;
      complete = complete && warp[j].state == State::kAtExchange && warp[j].mask == warp[i].mask;
    }
    if (complete) finish_exchange(warp, warp[i].mask);
  }
}

void Engine::finish_exchange(Fiber* warp, unsigned mask) {
  std::vector<Fiber*> members;
  for (int i = 0; i < lanes_of(warp); ++i) {
    if ((mask >> i & 1u) && warp[i].state == State::kAtExchange) members.push_back(&warp[i]);
  }
  for (Fiber* fiber : members) {
    if (!same(fiber->site, members[0]->site)) {
      fail(kernel, ": lanes of one mask meet at different calls: ", where(*members[0]), ", ",
           where(*fiber));
    }
    fiber->answer = {fiber->value, 0};
    if (fiber->kind == Exchange::kShuffle) {
      const Fiber* source = fiber->source < lanes_of(warp) ? &warp[fiber->source] : nullptr;
      if (std::find(members.begin(), members.end(), source) == members.end()) {
        fail(kernel, ": ", where(*fiber), ", but lane ", fiber->source,
             ", whose value it wants, takes no part");
      }
      fiber->answer.value = source->value;
    }
    for (const Fiber* other : members) {
      const bool yes =
          fiber->kind == Exchange::kMatch ? other->value == fiber->value : other->value != 0;
      fiber->answer.lanes |= static_cast<unsigned>(yes) << (other - warp);
    }
  }
  for (Fiber* fiber : members) fiber->state = State::kReady;
}

bool Engine::finish_barrier() {
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kAtBlockBarrier) return false;
    if (!same(fiber.site, fibers[0].site)) {
      fail(kernel, ": divergent __syncthreads: ", where(fibers[0]), ", ", where(fiber));
    }
  }
  for (Fiber& fiber : fibers) fiber.state = State::kReady;
  return true;
}

void Engine::stuck() {
  const Fiber* waiting = nullptr;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kReturned) waiting = &fiber;
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.state != waiting->state || fiber.mask != waiting->mask) {
      fail(kernel, ": divergent barrier: ", where(*waiting), ", ", where(fiber));
    }
  }
  fail(kernel, ": divergent barrier: ", where(*waiting));
}

void Engine::run_block() {
  shared.clear();
  dynamic_shared = poisoned(shape.shared_bytes);
  for (Fiber& fiber : fibers) start(fiber);
  stay = random.below(3) * 120;
  int warp = -1;
  for (;;) {
    if (warp < 0 || !random.chance(stay)) warp = static_cast<int>(random.below(warps()));
    bool ran = false;  // the chosen warp, else the next ones
    for (int i = 0; i < warps() && !ran; ++i) {
      ran = step(warp);
      if (!ran) warp = (warp + 1) % warps();
    }
    if (ran) continue;
    const auto returned = [](const Fiber& fiber) { return fiber.state == State::kReturned; };
    if (std::all_of(fibers.begin(), fibers.end(), returned)) return;
    if (!finish_barrier()) stuck();
  }
}

uint64_t launch_seed() {
  static std::string last;
  static uint64_t launches = 0;
  const char* text = std::getenv("T4R_FAST_SHUFFLE");
  const std::string seed = text == nullptr ? "" : text;
  launches = seed == last ? launches + 1 : 0;
  last = seed;
  return std::strtoull(seed.c_str(), nullptr, 10) * 1000003u + launches;
}

void check(const char* kernel, const Shape& shape) {
  const dim3 &grid = shape.grid, &block = shape.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxBlock) fail(kernel, ": a block of ", threads, " threads");
  if (shape.shared_bytes > kMaxShared) {
    fail(kernel, ": ", shape.shared_bytes, " bytes of shared memory, at most ", kMaxShared);
  }
  if (grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 || grid.y > kMaxGridYZ || grid.z == 0 ||
      grid.z > kMaxGridYZ) {
    fail(kernel, ": a grid of (", grid.x, ", ", grid.y, ", ", grid.z, ") blocks");
  }
}

}  // namespace

void run(const char* kernel, const Shape& shape, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  check(kernel, shape);
  Engine& e = engine;
  e.random = Random(launch_seed());
  e.kernel = kernel;
  e.body = &body;
  e.shape = shape;
  e.fibers.assign(shape.block.x * shape.block.y * shape.block.z, {});
  blockDim = shape.block;
  gridDim = shape.grid;
  for (size_t i = 0; i < e.fibers.size(); ++i) {
    const unsigned thread = static_cast<unsigned>(i), x = shape.block.x, y = shape.block.y;
    e.fibers[i].index = {thread % x, thread / x % y, thread / x / y};
  }
  std::vector<uint64_t> blocks(uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  e.random.shuffle(blocks);
  for (uint64_t block : blocks) {
    const uint64_t x = shape.grid.x, y = shape.grid.y;
    blockIdx = {static_cast<unsigned>(block % x), static_cast<unsigned>(block / x % y),
                static_cast<unsigned>(block / x / y)};
    e.run_block();
  }
  e.shared.clear();
}

void block_barrier(Site site) {
  engine.current->state = State::kAtBlockBarrier;
  engine.current->site = site;
  engine.leave();
}

Answer exchange(Exchange kind, unsigned mask, uint64_t value, int source, Site site) {
  Fiber& fiber = *engine.current;
  if (!(mask >> lane() & 1u)) {
    fail(engine.kernel, ": lane ", lane(), " is not in its own mask at ", site.file, ":",
         site.line);
  }
  fiber.kind = kind;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.site = site;
  fiber.state = State::kAtExchange;
  engine.leave();
  return fiber.answer;
}

int lane() {
  return engine.number(*engine.current) % kWarp;
}

void atomic_point() {
  if (engine.random.chance(64)) engine.leave();
}

void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  size_t total = bytes + engine.shape.shared_bytes;
  for (SharedMemory& memory : engine.shared) {
    if (memory.key == key) return memory.data.get();
    total += memory.bytes;
  }
  if (alignment > kSharedAlignment || total > kMaxShared) {
    fail(engine.kernel, ": ", total, " bytes of shared memory, aligned to ", alignment,
         "; at most ", kMaxShared, " bytes, aligned to ", kSharedAlignment);
  }
  // An allocation of its own: AddressSanitizer knows where it ends.
  engine.shared.push_back({key, bytes, poisoned(bytes)});
  return engine.shared.back().data.get();
}

void* dynamic_shared_memory() {
  if (engine.shape.shared_bytes == 0) fail(engine.kernel, ": launched without shared bytes");
  return engine.dynamic_shared.get();
}

}  // namespace cuda_on_cpu
