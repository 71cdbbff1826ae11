"""How much of the memory linearisation residuals may take."""

import dataclasses

import numpy as np

from curvax.memory import memory_of
from curvax.operators.space import VectorSpace
from curvax.typing import PyTree

# Rows of the basis with which ten pairs need no more products than with any number of rows: what
# `krylov.sizes.comfortable_rows` says, for a solve that nobody has asked for yet.
WANTED_ROWS = 20


@dataclasses.dataclass(frozen=True)
class ResidualBudget:
    """What linearisation residuals may take.

    Attributes:
        bytes: in all.
        scratch: how many microbatches' residuals must fit beside those that are kept.
    """

    bytes: float
    scratch: int = 0

    @classmethod
    def of(cls, linearize: object, space: VectorSpace, arrays: PyTree) -> "ResidualBudget":
        """On a device, what the rows that a solve wants and the scratch of a product leave.

        A basis that restarts often costs up to half of the products again, and so do residuals that
        are recomputed; but a solve that does not fit costs all. The scratch of a product is not
        known before it is compiled, and about as large as the residuals of a microbatch.
        """
        if linearize != "auto":
            return cls(float("inf") if linearize else 0.0)
        memory = memory_of(arrays)
        if not memory.on_device:
            return cls(memory.shareable)
        narrowest = 2 if space.dtype == np.float32 else space.dtype.itemsize
        return cls(memory.shareable - WANTED_ROWS * space.n * narrowest, scratch=1)
