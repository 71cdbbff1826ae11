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
  nb::list compiled, supported;
  for (int i = 0; kCompiledTargets[i] != nullptr; ++i) {
    compiled.append(kCompiledTargets[i]);
    if (TableForTarget(kCompiledTargets[i]) != nullptr) supported.append(kCompiledTargets[i]);
  }
  const KernelTable* active = ActiveTable();
  nb::dict info = CommonFacts(kHandlers);
  info["compiled_targets"] = compiled;
  info["supported_targets"] = supported;
  info["active_target"] = active == nullptr ? nb::object(nb::none()) : nb::str(active->target);
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
  m.def("build_info", &curvax::BuildInfo,
        "Facts about this build and the active target; that is None if CURVAX_ISA names none of "
        "those supported.");
}
