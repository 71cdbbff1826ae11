// The Python module curvax._native._cpu: handlers as capsules, and facts about the build.
//
// Handlers are registered from Python: the C++ registration struct changed its layout between FFI
// versions, jax.ffi.register_ffi_target does not.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "csrc/handlers.h"
#include "curvax/dispatch.h"

namespace nb = nanobind;

namespace curvax {
namespace {

nb::dict Registrations() {
  nb::dict handlers;
#define CURVAX_ADD_HANDLER(name) \
  handlers["curvax." #name] = nb::capsule(reinterpret_cast<void*>(curvax_cpu_##name));
  CURVAX_FOR_EACH_CPU_HANDLER(CURVAX_ADD_HANDLER)
#undef CURVAX_ADD_HANDLER
  return handlers;
}

nb::dict BuildInfo() {
  const char* error = nullptr;
  const KernelTable* table = ActiveTable(&error);
  if (table == nullptr) throw nb::value_error(error);
  nb::list levels;
  for (int i = 0; kCompiledLevels[i] != nullptr; ++i) levels.append(kCompiledLevels[i]);
  nb::list kernels;
#define CURVAX_ADD_NAME(name) kernels.append("curvax." #name);
  CURVAX_FOR_EACH_CPU_HANDLER(CURVAX_ADD_NAME)
#undef CURVAX_ADD_NAME
  nb::dict info;
  info["ffi_api_minor"] = XLA_FFI_API_MINOR;
  info["compiled_levels"] = levels;
  info["active_level"] = table->level;
  info["kernels"] = kernels;
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace
}  // namespace curvax

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU kernels of curvax, as XLA FFI handlers.";
  m.def("registrations", &curvax::Registrations, "Handlers by target name, as capsules.");
  m.def("build_info", &curvax::BuildInfo, "Facts about this build and the active CPU level.");
}
