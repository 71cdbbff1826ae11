// A vector that is put together of parts, with no pass over memory but those that write the parts.
//
// curvax.uninitialised_like: a result of the operand's size that nothing is written to. XLA has no
// such, and would fill it with zeros.
//
// curvax.put: out[start : start + n] = part, where `out` is meant to alias the result; it works
// unaliased. XLA updates in place too, but with one thread.
// Memory traffic: the part is read once and written once, by all threads.
#include <algorithm>
#include <cstring>

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

constexpr char kPut[] = "curvax.put";
// Bytes that a thread copies at a time: below this a second thread costs more than it saves.
constexpr int64_t kPiece = int64_t{256} << 10;

ffi::Error UninitialisedLike(ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) {
  return ffi::Error::Success();
}

void CopyByAll(char* to, const char* from, int64_t bytes, ffi::ThreadPool pool) {
  struct Job {
    char* to;
    const char* from;
    int64_t bytes;
  } job{to, from, bytes};
  const auto copy = [](void* context, int64_t, int64_t index) {
    const Job& own = *static_cast<Job*>(context);
    const int64_t first = index * kPiece;
    std::memcpy(own.to + first, own.from + first,
                static_cast<size_t>(std::min(kPiece, own.bytes - first)));
  };
  XlaParallelFor all(pool);
  const ParallelFor view = all.view();
  view.run(view.self, (bytes + kPiece - 1) / kPiece, copy, &job);
}

ffi::Error Put(ffi::ThreadPool pool, ffi::AnyBuffer out, ffi::AnyBuffer part,
               ffi::Buffer<ffi::S32> start, ffi::Result<ffi::AnyBuffer> result) {
  const auto whole = out.dimensions();
  if (whole.size() != 1 || part.dimensions().size() != 1 ||
      out.element_type() != part.element_type() || start.element_count() != 1) {
    return ffi::Error::InvalidArgument(std::string(kPut) +
                                       ": expected vectors of one dtype and a scalar start");
  }
  CURVAX_RETURN_IF_ERROR(CheckBuffer(kPut, "result", *result, out.element_type(), {whole[0]}));
  const int64_t count = static_cast<int64_t>(part.element_count());
  const int64_t first = *start.typed_data();
  if (first < 0 || first + count > whole[0]) {
    return ffi::Error::InvalidArgument(std::string(kPut) + ": the part reaches beyond the vector");
  }
  auto* to = static_cast<char*>(result->untyped_data());
  if (to != out.untyped_data()) {
    CopyByAll(to, static_cast<const char*>(out.untyped_data()),
              static_cast<int64_t>(out.size_bytes()), pool);
  }
  const auto width = static_cast<int64_t>(ffi::ByteWidth(out.element_type()));
  CopyByAll(to + first * width, static_cast<const char*>(part.untyped_data()), count * width, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_uninitialised_like, UninitialisedLike,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_put, Put,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace curvax
