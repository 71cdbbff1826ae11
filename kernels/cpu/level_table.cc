// The table of entry points of one instruction level; compiled once per level.
#include "curvax/dispatch.h"

#define CURVAX_STRING_(x) #x
#define CURVAX_STRING(x) CURVAX_STRING_(x)

namespace curvax::CURVAX_LEVEL {

extern const KernelTable kTable;
const KernelTable kTable = {
    CURVAX_STRING(CURVAX_LEVEL),
};

}  // namespace curvax::CURVAX_LEVEL
