// The table of entry points of one instruction level; compiled once per level.
#include "cpu/block_ortho_level.h"
#include "cpu/matmul_sum_level.h"
#include "cpu/softmax_ce_level.h"
#include "curvax/dispatch.h"

#define CURVAX_STRING_(x) #x
#define CURVAX_STRING(x) CURVAX_STRING_(x)

namespace curvax::CURVAX_LEVEL {

extern const KernelTable kTable;
const KernelTable kTable = {
    CURVAX_STRING(CURVAX_LEVEL),
    SoftmaxCeWorkspaceBytes,
    SoftmaxCe,
    MatmulSumWorkspaceBytes,
    MatmulSum,
    BlockOrthoWorkspaceBytes,
    BlockOrtho,
    RotateBasisWorkspaceBytes,
    RotateBasis,
};

}  // namespace curvax::CURVAX_LEVEL
