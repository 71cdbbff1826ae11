// Run-time choice among the targets that were compiled.
#include "curvax/dispatch.h"

#include <cstdlib>
#include <cstring>

namespace curvax {

namespace base {
extern const KernelTable kTable;
}
#ifdef CURVAX_HAVE_V3
namespace v3 {
extern const KernelTable kTable;
}
#endif
#ifdef CURVAX_HAVE_V4
namespace v4 {
extern const KernelTable kTable;
}
#endif

namespace {

struct Target {
  const KernelTable* table;
  bool supported;
};

// Fills `targets`, lowest first, and returns their number.
int Targets(Target* targets) {
  int count = 0;
  targets[count++] = {&base::kTable, true};
#ifdef CURVAX_HAVE_V3
  targets[count++] = {&v3::kTable, __builtin_cpu_supports("x86-64-v3") != 0};
#endif
#ifdef CURVAX_HAVE_V4
  targets[count++] = {&v4::kTable, __builtin_cpu_supports("x86-64-v4") != 0};
#endif
  return count;
}

}  // namespace

const char* const kCompiledTargets[kMaxTargets + 1] = {
    "base",
#ifdef CURVAX_HAVE_V3
    "v3",
#endif
#ifdef CURVAX_HAVE_V4
    "v4",
#endif
};

const KernelTable* TableForTarget(const char* name) {
  Target targets[kMaxTargets];
  const int count = Targets(targets);
  for (int i = 0; i < count; ++i) {
    if (targets[i].supported && std::strcmp(targets[i].table->target, name) == 0) {
      return targets[i].table;
    }
  }
  return nullptr;
}

const KernelTable* ActiveTable() {
  const char* wanted = std::getenv("CURVAX_ISA");
  if (wanted != nullptr && wanted[0] != '\0') return TableForTarget(wanted);
  Target targets[kMaxTargets];
  const KernelTable* best = nullptr;
  const int count = Targets(targets);
  for (int i = 0; i < count; ++i) {
    if (targets[i].supported) best = targets[i].table;
  }
  return best;
}

}  // namespace curvax
