// A vector that is put together of parts, with no pass over memory but those that write the parts.
//
// curvax.uninitialised_like: a result of the operand's size that nothing is written to. XLA has no
// such, and would fill it with zeros.
//
// curvax.zeros: a result of zeros, large ones on huge pages where the system has them for who asks
// (madvise): 512 times fewer page faults, and of the translation buffer's entries. XLA's own memory
// comes page by page, filled by one thread.
//
// curvax.put: out[start : start + n] = part, where `out` is meant to alias the result; it works
// unaliased. XLA updates in place too, but with one thread.
// Memory traffic: the part is read once and written once, by all threads.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

constexpr char kPut[] = "curvax.put";
// Bytes that a thread copies at a time: below this a second thread costs more than it saves.
constexpr int64_t kPiece = int64_t{256} << 10;
constexpr int64_t kHugePage = int64_t{2} << 20;

ffi::Error UninitialisedLike(ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) {
  return ffi::Error::Success();
}

// f(first, count) for pieces of `bytes` bytes, by all threads.
template <typename F>
void InPieces(int64_t bytes, int64_t piece, ffi::ThreadPool pool, const F& f) {
  struct Job {
    int64_t bytes, piece;
    const F* f;
  } job{bytes, piece, &f};
  const auto one = [](void* context, int64_t, int64_t index) {
    const Job& own = *static_cast<Job*>(context);
    const int64_t first = index * own.piece;
    (*own.f)(first, static_cast<size_t>(std::min(own.piece, own.bytes - first)));
  };
  XlaParallelFor all(pool);
  const ParallelFor view = all.view();
  view.run(view.self, (bytes + piece - 1) / piece, one, &job);
}

ffi::Error Zeros(ffi::ThreadPool pool, ffi::Result<ffi::AnyBuffer> result) {
  auto* to = static_cast<char*>(result->untyped_data());
  const auto bytes = static_cast<int64_t>(result->size_bytes());
  // Of the system's large mappings alone, which go when they are freed: glibc takes blocks below
  // 32 MiB from its heap, whose next owner did not ask for this.
  if (bytes >= int64_t{64} << 20) {
    const auto at = reinterpret_cast<uintptr_t>(to);
    const uintptr_t first = (at + kHugePage - 1) / kHugePage * kHugePage;
    madvise(to + (first - at), (at + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
  InPieces(bytes, 2 * kHugePage, pool,
           [to](int64_t first, size_t count) { std::memset(to + first, 0, count); });
  return ffi::Error::Success();
}

void CopyByAll(char* to, const char* from, int64_t bytes, ffi::ThreadPool pool) {
  InPieces(bytes, kPiece, pool, [to, from](int64_t first, size_t count) {
    std::memcpy(to + first, from + first, count);
  });
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_zeros, Zeros,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_put, Put,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace curvax
