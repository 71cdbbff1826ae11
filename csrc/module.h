// What the Python modules of all platforms share: their handlers as capsules, and by name.
//
// Handlers are registered from Python: the C++ registration struct changed its layout between FFI
// versions, jax.ffi.register_ffi_target does not.
#ifndef CURVAX_CSRC_MODULE_H_
#define CURVAX_CSRC_MODULE_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "csrc/handlers.h"

namespace curvax {

struct Handler {
  const char* name;
  XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*);
};

template <size_t n>
nanobind::dict Registrations(const Handler (&handlers)[n]) {
  nanobind::dict capsules;
  for (const Handler& handler : handlers) {
    capsules[handler.name] = nanobind::capsule(reinterpret_cast<void*>(handler.call));
  }
  return capsules;
}

// The facts that every module states.
template <size_t n>
nanobind::dict CommonFacts(const Handler (&handlers)[n]) {
  nanobind::list names;
  for (const Handler& handler : handlers) names.append(handler.name);
  nanobind::dict facts;
  facts["ffi_api_minor"] = XLA_FFI_API_MINOR;
  facts["kernels"] = names;
  return facts;
}

}  // namespace curvax

#endif  // CURVAX_CSRC_MODULE_H_
