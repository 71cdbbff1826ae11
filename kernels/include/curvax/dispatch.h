// Picks the instruction level at run time.
#ifndef CURVAX_DISPATCH_H_
#define CURVAX_DISPATCH_H_

namespace curvax {

// The entry points of one instruction level.
struct KernelTable {
  const char* level;
};

constexpr int kMaxLevels = 3;

// Names of the compiled levels, lowest first; null after the last.
extern const char* const kCompiledLevels[kMaxLevels + 1];

// The table of a level by name, or null if the level was not compiled or this machine lacks it.
const KernelTable* TableForLevel(const char* level);

// The best level of this machine, or the one named by the environment variable CURVAX_ISA.
// Null, with a message in *error, if that variable names a level that cannot be had.
const KernelTable* ActiveTable(const char** error);

}  // namespace curvax

#endif  // CURVAX_DISPATCH_H_
