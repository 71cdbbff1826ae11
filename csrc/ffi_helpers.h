// Checks and conversions that every handler needs, on any platform.
#ifndef CURVAX_CSRC_FFI_HELPERS_H_
#define CURVAX_CSRC_FFI_HELPERS_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "curvax/types.h"
#include "xla/ffi/api/ffi.h"

#define CURVAX_RETURN_IF_ERROR(expression)           \
  do {                                               \
    ::xla::ffi::Error curvax_error = (expression);   \
    if (curvax_error.failure()) return curvax_error; \
  } while (false)

namespace curvax {

inline std::optional<DType> ToDType(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::DataType::F32:
      return DType::kF32;
    case xla::ffi::DataType::F64:
      return DType::kF64;
    case xla::ffi::DataType::BF16:
      return DType::kBF16;
    case xla::ffi::DataType::F16:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

// The type that arrays stored as `storage` are computed in.
inline xla::ffi::DataType ComputeType(xla::ffi::DataType storage) {
  return storage == xla::ffi::DataType::F64 ? xla::ffi::DataType::F64 : xla::ffi::DataType::F32;
}

template <typename Dimensions>
std::string ShapeText(const Dimensions& dimensions) {
  std::string text = "(";
  for (const int64_t d : dimensions) text += std::to_string(d) + ",";
  return text + ")";
}

// An error unless `buffer` has this element type and these dimensions.
inline xla::ffi::Error CheckBuffer(const char* op, const char* name,
                                   const xla::ffi::AnyBuffer& buffer, xla::ffi::DataType type,
                                   std::initializer_list<int64_t> dimensions) {
  const auto got = buffer.dimensions();
  bool same = got.size() == dimensions.size();
  size_t i = 0;
  for (const int64_t d : dimensions) {
    same = same && got[i] == d;
    ++i;
  }
  if (!same) {
    return xla::ffi::Error::InvalidArgument(std::string(op) + ": " + name + " must have shape " +
                                            ShapeText(dimensions) + ", got " + ShapeText(got));
  }
  if (buffer.element_type() != type) {
    return xla::ffi::Error::InvalidArgument(std::string(op) + ": " + name +
                                            " has the wrong element type");
  }
  return xla::ffi::Error::Success();
}

// Copies an operand to the result that it was meant to alias, unless it does. A Platform has a
// Context and Copy(to, from, bytes, context).
template <typename Platform>
xla::ffi::Error CopyIfDifferent(const xla::ffi::AnyBuffer& from,
                                xla::ffi::Result<xla::ffi::AnyBuffer>& to,
                                typename Platform::Context context) {
  if (from.untyped_data() == to->untyped_data() || from.size_bytes() == 0) {
    return xla::ffi::Error::Success();
  }
  return Platform::Copy(to->untyped_data(), from.untyped_data(),
                        static_cast<int64_t>(from.size_bytes()), context);
}

}  // namespace curvax

#endif  // CURVAX_CSRC_FFI_HELPERS_H_
