// t4r_fast._C: host-side facts that are no ops.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side facts of this build and machine.";
  m.def("cpu_features", &cpu_features,
        "What the CPU and the operating system offer, by name; empty where it is no x86-64.");
  m.attr("compiler") = T4R_FAST_COMPILER;
  m.attr("flags") = T4R_FAST_FLAGS;
  m.attr("variants") = T4R_FAST_VARIANTS;
}
