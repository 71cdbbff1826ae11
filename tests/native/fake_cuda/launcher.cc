// StreamLauncher on the runtime beside this file, as plain functions.
#include "cuda/stream_launcher.h"

namespace {

struct Args {};
void First(Args) {}
void Second(Args args) { First(args); }

const char* Name(const void* function) {
  return function == reinterpret_cast<const void*>(&First) ? "first" : "second";
}

}  // namespace

// Each makes a launcher of its own and keeps the calls that it makes; the error, or null.
extern "C" const char* launch(int device, int kernel, int64_t blocks, int64_t shared_bytes,
                              bool fails) {
  fake::device = device;
  fake::fails = fails;
  fake::name = &Name;
  fake::log.clear();
  curvax::CURVAX_TARGET::StreamLauncher launcher(nullptr);
  launcher.Launch(kernel == 0 ? &First : &Second, {blocks, 64, shared_bytes}, Args{});
  return launcher.error();
}
extern "C" const char* residents(int device, int64_t shared_bytes, int64_t* blocks) {
  fake::device = device;
  fake::name = &Name;
  fake::fails = false;
  fake::log.clear();
  curvax::CURVAX_TARGET::StreamLauncher launcher(nullptr);
  *blocks = launcher.Residents(&Second, 64, shared_bytes);
  return launcher.error();
}
extern "C" const char* calls() { return fake::log.c_str(); }
