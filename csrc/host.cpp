// t4r_fast._C: host-side facts that are no ops.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "host_measure.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace {

#ifdef __x86_64__
// The operating system must save the wide registers too, else the CPU's flags mean nothing.
bool saves(uint64_t state) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t{high} << 32 | low) & state) == state;
}
#endif

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> found;
#ifdef __x86_64__
  __builtin_cpu_init();
  found["avx2"] = __builtin_cpu_supports("avx2");
  found["fma"] = __builtin_cpu_supports("fma");
  found["avx512f"] = __builtin_cpu_supports("avx512f");
  found["avx512bw"] = __builtin_cpu_supports("avx512bw");
  found["avx512vl"] = __builtin_cpu_supports("avx512vl");
  found["avx512dq"] = __builtin_cpu_supports("avx512dq");
  found["avx512_bf16"] = __builtin_cpu_supports("avx512bf16");
  // Older compilers do not know the names of AMX: leaf 7, edx bits 22, 24 and 25, and the tile
  // state, bits 17 and 18, which the system must save.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool leaf = __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool tiles = leaf && (d >> 24 & 1) && saves(uint64_t{3} << 17);
  found["amx_bf16"] = tiles && (d >> 22 & 1);
  found["amx_int8"] = tiles && (d >> 25 & 1);
#endif
  return found;
}

// How fast this machine multiplies, takes exp and moves bytes, in 1e9 per second.
pybind11::dict machine_floors(int threads, double seconds, const std::string& isa) {
  using t4r_fast::FloorKernels;
  const auto features = cpu_features();
  const auto has = [&](const char* name) { return features.count(name) && features.at(name); };
  std::map<std::string, const FloorKernels*> offered{{"portable", &t4r_fast::kFloorsPortable}};
  std::string best = "portable";
#ifdef __x86_64__
  if (has("avx2") && has("fma")) offered[best = "avx2"] = &t4r_fast::kFloorsAvx2;
  if (has("avx512f")) offered[best = "avx512"] = &t4r_fast::kFloorsAvx512;
#endif
  const std::string chosen = isa == "best" ? best : isa;
  if (!offered.count(chosen)) {
    throw pybind11::value_error(
        "machine_floors: isa must be best, portable, avx2 or avx512, and in"
        " this CPU; got " +
        isa);
  }
  if (threads < 1 || !(seconds > 0)) {
    throw pybind11::value_error("machine_floors: threads must be >= 1 and seconds > 0; got " +
                                std::to_string(threads) + " and " + std::to_string(seconds));
  }
  std::map<std::string, t4r_fast::Rate> rates;
  {
    const pybind11::gil_scoped_release release;
    rates = t4r_fast::measure_floors(*offered[chosen], threads, seconds);
  }
  pybind11::dict by_cpu, by_wall, found;
  for (const auto& [name, rate] : rates) {
    by_cpu[name.c_str()] = rate.by_cpu;
    by_wall[name.c_str()] = rate.by_wall;
  }
  found["isa"] = chosen;
  found["threads"] = threads;
  found["cpu"] = by_cpu;
  found["wall"] = by_wall;
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side facts of this build and machine.";
  m.def("cpu_features", &cpu_features,
        "What the CPU and the operating system offer, by name; empty where it is no x86-64.");
  m.def("machine_floors", &machine_floors, pybind11::arg("threads") = 1,
        pybind11::arg("seconds") = 0.1, pybind11::arg("isa") = "best",
        "Limits of `threads` threads together, in 1e9 per second of CPU time and of wall time:\n"
        "fma (float32 FLOP), exp (float32), read, copy (read and written) and gather (256-byte rows"
        " at random)\nin bytes. Each is the best of three windows of `seconds`.");
  m.attr("compiler") = T4R_FAST_COMPILER;
  m.attr("flags") = T4R_FAST_FLAGS;
  m.attr("variants") = T4R_FAST_VARIANTS;
}
