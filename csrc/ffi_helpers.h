// Checks and conversions that every handler needs.
#ifndef CURVAX_CSRC_FFI_HELPERS_H_
#define CURVAX_CSRC_FFI_HELPERS_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "curvax/dispatch.h"
#include "xla/ffi/api/ffi.h"

#define CURVAX_RETURN_IF_ERROR(expression)           \
  do {                                               \
    ::xla::ffi::Error curvax_error = (expression);   \
    if (curvax_error.failure()) return curvax_error; \
  } while (false)

namespace curvax {

// Memory for one call, aligned for any vector; null if it cannot be had.
//
// Up to kKept bytes stay with the thread for its next call: a fresh allocation of this size is
// mapped page by page while the kernel runs, which costs more than the kernel's work on it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    thread_local Kept kept;
    if (kept.memory == nullptr || bytes > kept.bytes) {
      kept.bytes = 0;
      kept.memory.reset(Allocate(bytes));
      if (kept.memory != nullptr && bytes <= kKept) kept.bytes = bytes;
    }
    memory_ = kept.memory.get();
    if (bytes > kKept) own_ = std::move(kept.memory);
  }
  void* get() const { return memory_; }

 private:
  static constexpr int64_t kKept = int64_t{8} << 20;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<void, Free>;
  struct Kept {
    Memory memory;
    int64_t bytes = 0;
  };
  static void* Allocate(int64_t bytes) {
    return std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64));
  }

  void* memory_;
  Memory own_;
};

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

// Copies an operand to the result that it was meant to alias, unless it does.
inline void CopyIfDifferent(const xla::ffi::AnyBuffer& from,
                            xla::ffi::Result<xla::ffi::AnyBuffer>& to) {
  if (from.untyped_data() != to->untyped_data() && from.size_bytes() > 0) {
    std::memcpy(to->untyped_data(), from.untyped_data(), from.size_bytes());
  }
}

// The kernels of the active level, chosen once; an error names what CURVAX_ISA may be.
inline xla::ffi::Error FindKernels(const KernelTable** kernels) {
  static const char* error = nullptr;
  static const KernelTable* const table = ActiveTable(&error);
  if (table == nullptr) return xla::ffi::Error::InvalidArgument(std::string("curvax: ") + error);
  *kernels = table;
  return xla::ffi::Error::Success();
}

}  // namespace curvax

#endif  // CURVAX_CSRC_FFI_HELPERS_H_
