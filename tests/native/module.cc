// The kernels seen from NumPy, for tests: any instruction level, any number of threads.
#include <pybind11/pybind11.h>

#include "curvax/dispatch.h"

namespace py = pybind11;

namespace curvax {
namespace {

py::list Levels() {
  py::list levels;
  for (int i = 0; kCompiledLevels[i] != nullptr; ++i) {
    if (TableForLevel(kCompiledLevels[i]) != nullptr) levels.append(kCompiledLevels[i]);
  }
  return levels;
}

}  // namespace
}  // namespace curvax

PYBIND11_MODULE(curvax_native_tests, m) {
  m.def("levels", &curvax::Levels, "Instruction levels that were compiled and that this machine has.");
}
