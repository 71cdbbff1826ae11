"""Products of an operator with random probes, counted, timed and checked."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.device import probes, probing, programs
from curvax.estimators.deflation import Deflation
from curvax.krylov.scaling import check_range
from curvax.operators.base import Operator
from curvax.operators.evidence import report_nonfinite
from curvax.program import Clock


class Products:
    """An operator, the probes of a seed, and the products made with them.

    Attributes:
        op: the operator.
        seed: of the probes.
        distribution: of the probes.
        clock: charged for the products.
        deflation: what is known of the operator beforehand.
        matvecs: products so far, but for those of the deflation.
    """

    def __init__(
        self, op: Operator, seed: int, distribution: str, clock: Clock, deflation: Deflation
    ) -> None:
        self.op = op
        self.seed = seed
        self.distribution = distribution
        self.clock = clock
        self.deflation = deflation
        self.matvecs = 0
        self._longest = 0.0

    @property
    def dimension(self) -> int:
        """The dimension of the space on which the trace is unknown."""
        return self.op.shape[0] - self.deflation.count

    @property
    def eps(self) -> float:
        """Relative error of a rounding of the products."""
        return float(jnp.finfo(self.op.dtype).eps)

    def probes(self, first: int, count: int, off: Array | None) -> Array:
        """Rows of the seed's sequence, less their components along the orthonormal rows `off`."""
        like = jnp.zeros(count, jnp.int32)
        block = probes.draw(self.clock, self.op, like, self.seed, first, self.distribution)
        return block if off is None else probing.project_off(self.clock, off, block)

    def multiply(self, block: Array, keep: bool = True) -> Array:
        """The products of a block, which is consumed unless `keep`; finished when this returns."""
        with self.clock.part("products"):
            self.matvecs += len(block)
            # The program consumes its argument, and is the one that the eigensolver has compiled.
            given = jnp.copy(block) if keep else block
            return jax.block_until_ready(programs.multiply(self.clock, self.op, given))

    def forms(self, block: Array, products: Array) -> tuple[Any, Any, Any]:
        """`zᵀw`, `zᵀz` and `wᵀw` of rows and their products, `(b,)` NumPy arrays.

        Raises:
            FloatingPointError: a product is not finite.
            OutOfRange: see `check_range`.
        """
        zw, zz, ww = (np.asarray(x) for x in probing.forms(self.clock, block, products))
        if not np.isfinite(ww).all():
            report_nonfinite(self.op, products, self.matvecs)
        if self.deflation.vectors is None:
            # What deflated pairs leave may be zero; they are checked by a product of their own.
            self._longest = max(self._longest, math.sqrt((ww / zz).max()))
            check_range(self.op, self._longest)
        return zw, zz, ww
