// Dropout from a counter, as t4r_fast/plain/_dropout.py has it: which columns of a row stay. Plain
// data only, as item_table.h.
#pragma once

#include <stdint.h>

namespace t4r_fast {

// What one site of a model drops; made by dropout_of (dropout_key.h).
struct Dropout {
  uint64_t key;
  uint32_t least;  // a word above it stays
  bool draws;      // false: everything stays, key and least mean nothing
  double scale;    // 1 / (1 - probability): what stays is multiplied by it
};

// The row of a counter: a place that is not negative is session << 32 | position.
struct DropoutRow {
  uint32_t session, position, head;
};

}  // namespace t4r_fast
