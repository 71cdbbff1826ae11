#include "simt/kernels.h"

#include <algorithm>
#include <vector>

#include "cuda/block_ortho_launch.h"
#include "cuda/softmax_ce_launch.h"
#include "simt/launcher.h"

namespace curvax::emulated {
namespace {

// A workspace of NaN, as an allocator may leave it, with a guard behind it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard, char(0xff)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    begin_ = reinterpret_cast<char*>((address + 63) / 64 * 64);
    std::fill(begin_ + bytes_, memory_.data() + memory_.size(), char(0xa5));
  }
  void* get() const { return begin_; }
  std::string Result(const std::string& error) const {
    const char* end = memory_.data() + memory_.size();
    const bool intact = std::all_of(static_cast<const char*>(begin_) + bytes_, end,
                                    [](char c) { return c == char(0xa5); });
    return !error.empty() ? error : intact ? "" : "a write past the workspace";
  }

 private:
  static constexpr int64_t kGuard = 256;
  const int64_t bytes_;
  std::vector<char> memory_;
  char* begin_;
};

}  // namespace

std::string SoftmaxCe(const Device& device, SoftmaxCeArgs args) {
  Launcher launcher(device);
  // Of the parts of a row, which this device may not be large enough to do without.
  const int64_t element = args.dtype == DType::kF64 ? 8 : 4;
  const Workspace workspace(
      std::max(CURVAX_TARGET::SoftmaxCeWorkspaceBytes(args),
               args.rows * CURVAX_TARGET::RowParts(args.vocab, element) * (4 + args.tangents) * 8));
  args.workspace = workspace.get();
  CURVAX_TARGET::LaunchSoftmaxCe(args, launcher);
  return workspace.Result(launcher.error);
}

std::string BlockOrtho(const Device& device, BlockOrthoArgs args) {
  Launcher launcher(device);
  const Workspace workspace(CURVAX_TARGET::BlockOrthoLayout(args).bytes);
  args.workspace = workspace.get();
  const int32_t used = static_cast<int32_t>(args.used);
  const uint32_t seed[2] = {static_cast<uint32_t>(args.seed),
                            static_cast<uint32_t>(args.seed >> 32)};
  args.used = args.seed = 0;
  CURVAX_TARGET::LaunchBlockOrtho(args, &used, seed, launcher);
  return workspace.Result(launcher.error);
}

std::string RotateBasis(const Device& device, RotateBasisArgs args) {
  Launcher launcher(device);
  const Workspace workspace(CURVAX_TARGET::RotateWorkspaceBytes(args.rows));
  args.workspace = workspace.get();
  const int32_t used = static_cast<int32_t>(args.used), kept = static_cast<int32_t>(args.kept);
  args.used = args.kept = 0;
  CURVAX_TARGET::LaunchRotateBasis(args, &used, &kept, launcher);
  return workspace.Result(launcher.error);
}

}  // namespace curvax::emulated
