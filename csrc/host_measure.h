// The rates of the loops of host_floors.h on one thread or several.
#pragma once

#include <map>
#include <string>

#include "host_floors.h"

namespace t4r_fast {

// In 1e9 per second of the threads' own CPU time and of wall time, all threads together.
struct Rate {
  double by_cpu = 0;
  double by_wall = 0;
};

std::map<std::string, Rate> measure_floors(const FloorKernels& kernels, int threads,
                                           double seconds);

}  // namespace t4r_fast
