// The Python module curvax._native._cuda: handlers as capsules, the sizes of their workspaces, and
// facts about the build. It can be imported where there is no GPU and no driver.
#include <string>

#include "csrc/module.h"
#include "curvax/cuda.h"

namespace nb = nanobind;

namespace curvax {
namespace {

constexpr Handler kHandlers[] = {
#define CURVAX_HANDLER(name) {"curvax." #name, curvax_cuda_##name},
    CURVAX_FOR_EACH_CUDA_HANDLER(CURVAX_HANDLER)
#undef CURVAX_HANDLER
};

nb::dict BuildInfo() {
  nb::dict info = CommonFacts(kHandlers);
  info["architectures"] = cuda::Architectures();
  info["runtime"] = cuda::RuntimeVersion();
  return info;
}

nb::dict CheckDevice(int ordinal) {
  const cuda::DeviceFacts facts = cuda::CheckDevice(ordinal);
  nb::dict out;
  out["driver"] = facts.driver;
  out["capability"] = std::to_string(facts.major) + "." + std::to_string(facts.minor);
  out["free"] = facts.free;
  out["total"] = facts.total;
  out["error"] = facts.error;
  out["message"] = facts.message;
  return out;
}

DType ParseDType(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "float64") return DType::kF64;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw nb::value_error("dtype must be float32, float64, bfloat16 or float16");
}

int64_t SoftmaxCeWorkspace(const std::string& dtype, int64_t rows, int64_t vocab,
                           int64_t tangents) {
  SoftmaxCeArgs args = {};
  args.dtype = ParseDType(dtype);
  args.rows = rows;
  args.vocab = vocab;
  args.tangents = tangents;
  return cuda::SoftmaxCeWorkspace(args);
}

int64_t BlockOrthoWorkspace(const std::string& dtype, int64_t rows, int64_t n, int64_t block) {
  BlockOrthoArgs args = {};
  args.dtype = ParseDType(dtype);
  args.rows = rows;
  args.n = n;
  args.block = block;
  return cuda::BlockOrthoWorkspace(args);
}

int64_t RotateBasisWorkspace(int64_t rows) {
  RotateBasisArgs args = {};
  args.rows = rows;
  return cuda::RotateBasisWorkspace(args);
}

}  // namespace
}  // namespace curvax

NB_MODULE(_cuda, m) {
  m.doc() = "Compiled CUDA kernels of curvax, as XLA FFI handlers.";
  m.def(
      "registrations", [] { return curvax::Registrations(curvax::kHandlers); },
      "Handlers by target name, as capsules.");
  m.def("build_info", &curvax::BuildInfo, "Facts about this build.");
  m.def("check_device", &curvax::CheckDevice, nb::arg("ordinal"),
        "Loads all kernels on a device. Facts about it, and the name and text of the first error.");
  m.def("softmax_ce_workspace", &curvax::SoftmaxCeWorkspace, nb::arg("dtype"), nb::arg("rows"),
        nb::arg("vocab"), nb::arg("tangents"), "Bytes of the workspace of softmax_ce.");
  m.def("block_ortho_workspace", &curvax::BlockOrthoWorkspace, nb::arg("dtype"), nb::arg("rows"),
        nb::arg("n"), nb::arg("block"), "Bytes of the workspace of block_ortho.");
  m.def("rotate_basis_workspace", &curvax::RotateBasisWorkspace, nb::arg("rows"),
        "Bytes of the workspace of rotate_basis.");
}
