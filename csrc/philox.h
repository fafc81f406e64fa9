// Philox4x32-10: four random words from a 64-bit key and a 128-bit counter.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// No torch and no standard library beyond <cstdint>: device code includes it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace t4r_fast {

struct Words {
  uint32_t w[4];
};

HOST_DEVICE inline Words philox(uint64_t key, Words counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  auto [c0, c1, c2, c3] = counter.w;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c0, second = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// A number from 0 to n - 1; its bias, below n / 2**32, is nothing beside that of n <= 2**20.
HOST_DEVICE inline int64_t below(uint32_t word, int64_t n) {
  return static_cast<int64_t>((uint64_t{word} * static_cast<uint64_t>(n)) >> 32);
}

}  // namespace t4r_fast
