// Run-time choice among the instruction levels that were compiled.
#include "curvax/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

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

struct Level {
  const KernelTable* table;
  bool supported;
};

// Fills `levels`, lowest first, and returns their number.
int Levels(Level* levels) {
  int count = 0;
  levels[count++] = {&base::kTable, true};
#ifdef CURVAX_HAVE_V3
  levels[count++] = {&v3::kTable, __builtin_cpu_supports("x86-64-v3") != 0};
#endif
#ifdef CURVAX_HAVE_V4
  levels[count++] = {&v4::kTable, __builtin_cpu_supports("x86-64-v4") != 0};
#endif
  return count;
}

}  // namespace

const char* const kCompiledLevels[kMaxLevels + 1] = {
    "base",
#ifdef CURVAX_HAVE_V3
    "v3",
#endif
#ifdef CURVAX_HAVE_V4
    "v4",
#endif
};

const KernelTable* TableForLevel(const char* level) {
  Level levels[kMaxLevels];
  const int count = Levels(levels);
  for (int i = 0; i < count; ++i) {
    if (levels[i].supported && std::strcmp(levels[i].table->level, level) == 0) {
      return levels[i].table;
    }
  }
  return nullptr;
}

const KernelTable* ActiveTable(const char** error) {
  *error = nullptr;
  const char* wanted = std::getenv("CURVAX_ISA");
  if (wanted != nullptr && wanted[0] != '\0') {
    const KernelTable* table = TableForLevel(wanted);
    if (table != nullptr) return table;
    *error = "CURVAX_ISA is not a level this machine and build have";
    for (const char* name : {"base", "v3", "v4"}) {
      if (std::strcmp(name, wanted) == 0) return nullptr;
    }
    *error = "CURVAX_ISA must be one of: base, v3, v4";
    return nullptr;
  }
  Level levels[kMaxLevels];
  const KernelTable* best = nullptr;
  const int count = Levels(levels);
  for (int i = 0; i < count; ++i) {
    if (levels[i].supported) best = levels[i].table;
  }
  return best;
}

}  // namespace curvax
