// The Python module curvax._native._cpu: handlers as capsules, and facts about the build.
#include "csrc/module.h"
#include "curvax/dispatch.h"

namespace nb = nanobind;

namespace curvax {
namespace {

constexpr Handler kHandlers[] = {
#define CURVAX_HANDLER(name) {"curvax." #name, curvax_cpu_##name},
    CURVAX_FOR_EACH_CPU_HANDLER(CURVAX_HANDLER)
#undef CURVAX_HANDLER
};

nb::dict BuildInfo() {
  const char* error = nullptr;
  const KernelTable* table = ActiveTable(&error);
  if (table == nullptr) throw nb::value_error(error);
  nb::list levels;
  for (int i = 0; kCompiledLevels[i] != nullptr; ++i) levels.append(kCompiledLevels[i]);
  nb::dict info = CommonFacts(kHandlers);
  info["compiled_levels"] = levels;
  info["active_level"] = table->level;
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace
}  // namespace curvax

NB_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU kernels of curvax, as XLA FFI handlers.";
  m.def(
      "registrations", [] { return curvax::Registrations(curvax::kHandlers); },
      "Handlers by target name, as capsules.");
  m.def("build_info", &curvax::BuildInfo, "Facts about this build and the active CPU level.");
}
