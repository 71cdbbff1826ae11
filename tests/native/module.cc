// The kernels seen from NumPy, for tests: any CPU target, any number of threads.
//
// 16-bit arrays come as uint16 views. Arrays are written in place. The targets that `emulated`
// names run the kernels of a GPU; the number of threads then decides the order of its threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "curvax/dispatch.h"
#include "simt/kernels.h"
#include "simt/simt.h"

namespace py = pybind11;

namespace curvax {
namespace {

// Threads started for each loop, which all take indices from one counter.
class Threads {
 public:
  explicit Threads(int64_t count) : count_(count) {}
  ParallelFor view() { return {&Threads::Run, this, count_}; }

 private:
  static void Run(void* self, int64_t count, ParallelFor::Body body, void* context) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t worker) {
      for (int64_t i = next++; i < count; i = next++) body(context, worker, i);
    };
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < static_cast<Threads*>(self)->count_; ++t) threads.emplace_back(work, t);
    work(0);
    for (std::thread& thread : threads) thread.join();
  }
  const int64_t count_;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, Free> Allocate(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
}

const KernelTable& Table(const std::string& target) {
  const KernelTable* table = TableForTarget(target.c_str());
  if (table == nullptr) throw std::invalid_argument("no such target: " + target);
  return *table;
}

DType ParseDType(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "float64") return DType::kF64;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("no such dtype: " + name);
}

py::list Targets() {
  py::list targets;
  for (int i = 0; kCompiledTargets[i] != nullptr; ++i) {
    if (TableForTarget(kCompiledTargets[i]) != nullptr) targets.append(kCompiledTargets[i]);
  }
  return targets;
}

// Targets that run on the emulated GPU: the first with the shared memory of an H100, the second
// with none, so that rows of logits are shared by several blocks, and panels hold few rows. Either
// may say how many blocks the device holds at once: "gpu/5".
const char* const kEmulated[] = {"gpu", "gpu-parts"};
py::list EmulatedTargets() {
  py::list targets;
  for (const char* target : kEmulated) targets.append(target);
  return targets;
}
bool IsEmulated(const std::string& target) { return target.rfind("gpu", 0) == 0; }
emulated::Device EmulatedDevice(const std::string& target, int64_t seed) {
  const size_t slash = std::min(target.find('/'), target.size());
  const bool whole_rows = target.substr(0, slash) == kEmulated[0];
  emulated::Device device = {whole_rows ? int64_t{227} << 10 : 0, static_cast<uint32_t>(seed)};
  if (slash < target.size()) device.residents = std::stoll(target.substr(slash + 1));
  return device;
}
void Check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

// grad, loss and lse may be None: then only the products are computed.
void RunSoftmaxCe(const std::string& target, int64_t threads, const std::string& dtype,
                  const py::array& logits, const py::array& tangents, const py::array& labels,
                  const py::array& weights, py::array products, const py::object& grad,
                  const py::object& loss, const py::object& lse, double softcap, double z_loss,
                  double label_smoothing, int64_t ignore_index) {
  const auto output = [](const py::object& array) -> void* {
    return array.is_none() ? nullptr : py::cast<py::array>(array).mutable_data();
  };
  SoftmaxCeArgs args = {};
  args.dtype = ParseDType(dtype);
  args.rows = logits.shape(0);
  args.vocab = logits.shape(1);
  args.tangents = tangents.shape(0);
  args.logits = logits.data();
  args.u = tangents.data();
  args.labels = static_cast<const int32_t*>(labels.data());
  args.weights = weights.data();
  args.products = products.mutable_data();
  args.grad = output(grad);
  args.loss = output(loss);
  args.lse = output(lse);
  args.softcap = softcap;
  args.z_loss = z_loss;
  args.label_smoothing = label_smoothing;
  args.ignore_index = ignore_index;
  if (IsEmulated(target)) return Check(emulated::SoftmaxCe(EmulatedDevice(target, threads), args));
  const KernelTable& table = Table(target);
  Threads pool(threads);
  const auto workspace = Allocate(table.softmax_ce_workspace_bytes(args, threads));
  args.workspace = workspace.get();
  table.softmax_ce(args, pool.view());
}

// Products of bfloat16 tangents (N, V) over themselves, by the blocks from `first_block` on alone:
// arrays of more than 2^31 elements need not be filled.
void RunLastBlocks(const std::string& target, int64_t first_block, const py::array& logits,
                   py::array tangents, const py::array_t<int32_t>& labels,
                   const py::array_t<float>& weights) {
  SoftmaxCeArgs args = {};
  args.dtype = DType::kBF16;
  args.rows = logits.shape(0);
  args.vocab = logits.shape(1);
  args.tangents = 1;
  args.logits = logits.data();
  args.u = args.products = tangents.mutable_data();
  args.labels = labels.data();
  args.weights = weights.data();
  args.ignore_index = -100;
  emulated::Device device = EmulatedDevice(target, 1);
  device.first_block = first_block;
  device.residents = INT64_MAX;  // a block for each piece of work
  Check(emulated::SoftmaxCe(device, args));
}

// Operands (batch, rows, columns) by their strides, so transposed and broadcast views will do.
void RunMatmulSum(const std::string& target, int64_t threads, const py::list& a, const py::list& b,
                  py::array c, bool add) {
  const KernelTable& table = Table(target);
  MatmulSumArgs args = {};
  args.dtype = c.itemsize() == sizeof(double) ? DType::kF64 : DType::kF32;
  args.batch = c.shape(0);
  args.m = c.shape(1);
  args.n = c.shape(2);
  args.terms = static_cast<int>(a.size());
  const auto read = [](const py::handle& handle, MatrixBatch* out) {
    const auto array = py::cast<py::array>(handle);
    const int64_t size = array.itemsize();
    *out = {array.data(), array.strides(0) / size, array.strides(1) / size,
            array.strides(2) / size};
    return array;
  };
  for (int t = 0; t < args.terms; ++t) {
    args.k = read(a[t], &args.a[t]).shape(2);
    read(b[t], &args.b[t]);
  }
  args.c = c.mutable_data();
  args.add = add;
  Threads pool(threads);
  const auto workspace = Allocate(table.matmul_sum_workspace_bytes(args, threads));
  args.workspace = workspace.get();
  table.matmul_sum(args, pool.view());
}

// `sets`: pairs of a dtype's name and a matrix, all of whose rows are meant, to the length n.
// `runs` is (runs, 3).
void RunInnerProducts(const std::string& target, int64_t threads, const py::list& sets, int64_t n,
                      const py::array_t<int64_t>& runs, py::array_t<double> products) {
  const KernelTable& table = Table(target);
  InnerProductsArgs args = {};
  args.n = n;
  for (const py::handle& handle : sets) {
    const auto set = py::cast<py::tuple>(handle);
    const auto matrix = py::cast<py::array>(set[1]);
    args.sets[args.num_sets++] = {ParseDType(py::cast<std::string>(set[0])), matrix.data(),
                                  matrix.strides(0) / matrix.itemsize(), matrix.shape(0)};
  }
  args.num_runs = runs.shape(0);
  args.runs = reinterpret_cast<const ProductRun*>(runs.data());
  args.products = products.mutable_data();
  Threads pool(threads);
  const auto workspace = Allocate(table.inner_products_workspace_bytes(args, threads));
  args.workspace = workspace.get();
  table.inner_products(args, pool.view());
}

// Of the rows of `x` and of `q`, with as many columns in storage, to the length of those of `w`.
void RunResidualProducts(const std::string& target, int64_t threads, const std::string& dtype,
                         const py::array& x, const py::array& w, const py::array& q,
                         const py::array_t<double>& shifts, const py::array_t<double>& thetas,
                         const py::array_t<double>& coupling, py::array_t<double> products) {
  const KernelTable& table = Table(target);
  ResidualProductsArgs args = {};
  args.dtype = ParseDType(dtype);
  args.n = w.shape(1);
  args.pairs = w.shape(0);
  args.x = x.data();
  args.q = q.data();
  args.stride = x.shape(1);
  args.w = w.data();
  args.shifts = shifts.data();
  args.thetas = thetas.data();
  args.coupling = coupling.data();
  args.products = products.mutable_data();
  Threads pool(threads);
  const auto workspace = Allocate(table.residual_products_workspace_bytes(args, threads));
  args.workspace = workspace.get();
  table.residual_products(args, pool.view());
}

void RunBlockOrtho(const std::string& target, int64_t threads, const std::string& dtype,
                   py::array basis, py::array block, int64_t used, uint64_t seed, double scale,
                   py::array_t<double> coefficients, py::array_t<double> factor,
                   py::array_t<double> info, double lazy_below) {
  BlockOrthoArgs args = {};
  args.dtype = ParseDType(dtype);
  args.rows = basis.shape(0);
  args.n = block.shape(1);
  args.stride = basis.shape(1);
  args.used = used;
  args.block = block.shape(0);
  args.scale = scale;
  args.lazy_below = lazy_below;
  args.seed = seed;
  args.basis = basis.mutable_data();
  args.w = block.mutable_data();
  args.coefficients = coefficients.mutable_data();
  args.factor = factor.mutable_data();
  args.info = info.mutable_data();
  if (IsEmulated(target)) return Check(emulated::BlockOrtho(EmulatedDevice(target, threads), args));
  const KernelTable& table = Table(target);
  Threads pool(threads);
  const auto workspace = Allocate(table.block_ortho_workspace_bytes(args, threads));
  args.workspace = workspace.get();
  table.block_ortho(args, pool.view());
}

void RunRotateBasis(const std::string& target, int64_t threads, const std::string& dtype,
                    py::array basis, const py::array_t<double>& rotation, int64_t used,
                    int64_t kept) {
  RotateBasisArgs args = {};
  args.dtype = ParseDType(dtype);
  args.rows = basis.shape(0);
  args.n = basis.shape(1);
  args.used = used;
  args.kept = kept;
  args.basis = basis.mutable_data();
  args.rotation = rotation.data();
  if (IsEmulated(target))
    return Check(emulated::RotateBasis(EmulatedDevice(target, threads), args));
  const KernelTable& table = Table(target);
  Threads pool(threads);
  const auto workspace = Allocate(table.rotate_basis_workspace_bytes(args, threads));
  args.workspace = workspace.get();
  table.rotate_basis(args, pool.view());
}

}  // namespace
}  // namespace curvax

PYBIND11_MODULE(curvax_native_tests, m) {
  m.def("targets", &curvax::Targets, "CPU targets that were compiled and that this machine has.");
  m.def("take_bytes_read", &simt::TakeBytesRead,
        "Bytes that the emulated GPU has copied or streamed from its memory since the last call.");
  m.def("emulated", &curvax::EmulatedTargets, "Targets that run on the emulated GPU.");
  m.def("softmax_ce", &curvax::RunSoftmaxCe);
  m.def("softmax_ce_last_blocks", &curvax::RunLastBlocks);
  m.def("matmul_sum", &curvax::RunMatmulSum);
  m.def("inner_products", &curvax::RunInnerProducts);
  m.def("residual_products", &curvax::RunResidualProducts);
  m.def("block_ortho", &curvax::RunBlockOrtho, py::arg("target"), py::arg("threads"),
        py::arg("dtype"), py::arg("basis"), py::arg("block"), py::arg("used"), py::arg("seed"),
        py::arg("scale"), py::arg("coefficients"), py::arg("factor"), py::arg("info"),
        py::arg("lazy_below") = 0.0);
  m.def("rotate_basis", &curvax::RunRotateBasis);
}
