// The table of entry points of one target; compiled once for each.
#include "cpu/block_ortho.h"
#include "cpu/inner_products.h"
#include "cpu/matmul_sum.h"
#include "cpu/softmax_ce.h"
#include "curvax/dispatch.h"

#define CURVAX_STRING_(x) #x
#define CURVAX_STRING(x) CURVAX_STRING_(x)

namespace curvax::CURVAX_TARGET {

extern const KernelTable kTable;
const KernelTable kTable = {
    CURVAX_STRING(CURVAX_TARGET),
    SoftmaxCeWorkspaceBytes,
    SoftmaxCe,
    MatmulSumWorkspaceBytes,
    MatmulSum,
    BlockOrthoWorkspaceBytes,
    BlockOrtho,
    RotateBasisWorkspaceBytes,
    RotateBasis,
    InnerProductsWorkspaceBytes,
    InnerProducts,
    ResidualProductsWorkspaceBytes,
    ResidualProducts,
};

}  // namespace curvax::CURVAX_TARGET
