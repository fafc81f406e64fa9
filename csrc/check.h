// Argument checks of native ops. Python checks meaning and speaks first; these guard memory.
#pragma once

#include <sstream>
#include <stdexcept>

// Not STD_TORCH_CHECK: it prefixes function, file and line, and users read these messages.
#define CHECK(condition, ...)                                   \
  do {                                                          \
    if (__builtin_expect(!(condition), 0)) {                    \
      throw std::runtime_error(t4r_fast::message(__VA_ARGS__)); \
    }                                                           \
  } while (false)

namespace t4r_fast {

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

}  // namespace t4r_fast

#define CHECK_DIM(op, tensor, rank, shape)                                             \
  CHECK((tensor).dim() == (rank), op, ": " #tensor " must have shape " shape "; got ", \
        (tensor).dim(), " dimensions")

#define CHECK_INT64(op, tensor)                                            \
  CHECK((tensor).scalar_type() == torch::headeronly::ScalarType::Long, op, \
        ": " #tensor " must be int64; got scalar type ", static_cast<int>((tensor).scalar_type()))
