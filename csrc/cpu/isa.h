// Which instruction set the kernels use in this process. For files built for every CPU only.
#pragma once

#include <cstdlib>
#include <string>

#include "../check.h"

namespace t4r_fast {

enum class Isa { kPortable, kAvx2, kAvx512 };

inline bool has(Isa wanted) {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (wanted) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return wanted == Isa::kPortable;
}

inline Isa choose() {
  const char* name = std::getenv("T4R_FAST_CPU_ISA");
  if (name == nullptr || *name == 0) {
    return has(Isa::kAvx512) ? Isa::kAvx512 : has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
  }
  const std::string wanted = name;
  CHECK(wanted == "portable" || wanted == "avx2" || wanted == "avx512",
        "T4R_FAST_CPU_ISA must be portable, avx2 or avx512; got ", wanted);
  const Isa chosen = wanted == "avx512" ? Isa::kAvx512
                     : wanted == "avx2" ? Isa::kAvx2
                                        : Isa::kPortable;
  CHECK(has(chosen), "T4R_FAST_CPU_ISA is ", wanted,
        ", which this CPU does not have; unset it to take the widest that there is");
  return chosen;
}

// The widest that the CPU has, or the one that T4R_FAST_CPU_ISA names: portable, avx2 or avx512.
// Throws when the CPU lacks it. The variable is read at the first call.
inline Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

// portable, avx2 and avx512 hold the same kernels; files of the last two are built on x86-64 only.
#ifdef __x86_64__
#define CHOOSE_BY_ISA(name)                  \
  (t4r_fast::isa() == t4r_fast::Isa::kAvx512 \
       ? name##_avx512                       \
       : (t4r_fast::isa() == t4r_fast::Isa::kAvx2 ? name##_avx2 : name##_portable))
#else
#define CHOOSE_BY_ISA(name) (t4r_fast::isa(), name##_portable)
#endif

}  // namespace t4r_fast
