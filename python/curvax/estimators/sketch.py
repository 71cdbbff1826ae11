"""A sketch: an orthonormal basis of `A Ω`, and the small matrices of the leave-one-out methods.

With X the d deflated vectors and P = I − XᵀX, for the operator P A P and the probes P Ω:

    basis : (d + k, n) rows, X and then Q, orthonormal. The only array of that length that is kept
    R     : (k, k) `P A P Ω = Qᵀ R`
    H     : (k, k) `Q A Qᵀ`, from k more products

The probes are not kept: what is needed of them afterwards, their inner products with the basis and
with each other, is computed from the same random numbers, drawn again.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.checks import seed_word
from curvax.device import probing, programs
from curvax.estimators import leave_one_out
from curvax.estimators.leave_one_out import LeaveOneOut
from curvax.estimators.products import Products
from curvax.operators.evidence import check_form, report_nonfinite
from curvax.program import host
from curvax.typing import Float64Array


@dataclasses.dataclass(frozen=True)
class Overlaps:
    """Inner products of a sketch's probes.

    Attributes:
        basis: `(k, k)` with the rows Q of the basis.
        gram: `(k, k)` with each other.
    """

    basis: Float64Array
    gram: Float64Array


class Sketch:
    """A sketch that grows block by block.

    Holds `capacity + d` n-vectors, and while it grows three blocks more; where its capacity is
    doubled, for a moment both bases.
    """

    def __init__(
        self,
        source: Products,
        capacity: int,
        project: bool,
        keep: Callable[[Array], None] | None = None,
    ) -> None:
        """Make an empty sketch.

        Args:
            source: makes the products and counts them.
            capacity: vectors that there is memory for.
            project: whether to multiply the basis too, for H.
            keep: called with the products of every new block of Q.
        """
        self.source = source
        self.size = 0
        self.hutchinson: list[float] = []
        self._project = project
        self._keep = keep
        self._known = source.deflation.count
        self._replacements = 0
        n = source.op.shape[0]
        shape = (self._known + capacity, n)
        self.basis = programs.empty_basis(source.clock, shape, source.op.dtype)
        if source.deflation.vectors is not None:
            first = np.int32(0)
            self.basis = probing.store(
                source.clock, self.basis, source.deflation.vectors, host(first)
            )
        self._factor = np.zeros((capacity, capacity))
        self._projected = np.zeros((capacity, capacity))

    @property
    def capacity(self) -> int:
        """Vectors that there is memory for."""
        return len(self._factor)

    @property
    def factor(self) -> Float64Array:
        """R."""
        return self._factor[: self.size, : self.size]

    @property
    def projected(self) -> Float64Array:
        """H."""
        return self._projected[: self.size, : self.size]

    @property
    def frobenius(self) -> float:
        """The operator's Frobenius norm, estimated by the products with the probes."""
        return float(np.linalg.norm(self.factor)) / math.sqrt(self.size)

    def reserve(self, capacity: int) -> None:
        """Make room for more vectors."""
        more = capacity - self.capacity
        self.basis = jnp.pad(self.basis, ((0, more), (0, 0)))
        self._factor = np.pad(self._factor, ((0, more), (0, more)))
        self._projected = np.pad(self._projected, ((0, more), (0, more)))

    def extend(self, count: int) -> None:
        """Multiply the next probes, and add their products to the basis."""
        source, old = self.source, self.size
        known = source.deflation.vectors
        block = source.probes(old, count, known)
        programs.check_products(source.clock, source.op, block)
        products = source.multiply(block)
        zw, zz, _ = source.forms(block, products)
        scale = source.dimension / zz if source.distribution == "sphere" else 1.0
        self.hutchinson += list(zw * scale)
        del block
        rows = self._append(products)
        new = self.size = old + count
        if not self._project:
            return
        products = source.multiply(rows, keep=False)
        column = np.asarray(probing.inner(source.clock, self.basis, products))[self._known :]
        if not np.isfinite(column).all():
            report_nonfinite(source.op, products, source.matvecs)
        self._projected[:old, old:new] = column[:old]
        self._projected[old:new, :old] = column[:old].T
        self._projected[old:new, old:new] = (column[old:new] + column[old:new].T) / 2
        if self._keep is not None:
            self._keep(products)

    def _append(self, products: Array) -> Array:
        """Orthonormalise products into the basis; the new rows, which may be consumed."""
        source, old, count = self.source, self.size, len(products)
        self._replacements += 1
        seed = np.asarray([seed_word(source.seed), self._replacements], np.uint32)
        used = np.int32(self._known + old)
        self.basis, rows, numbers = programs.orthonormalize(
            source.clock, self.basis, products, host(used), host(seed)
        )
        coefficients, own, _ = programs.unpack(np.asarray(numbers)[0], count)
        new = old + count
        self._factor[:old, old:new] = coefficients[self._known : self._known + old]
        self._factor[old:new, old:new] = own
        return rows

    def overlaps(self) -> Overlaps:
        """The inner products of the probes, less their components along the deflated vectors."""
        source, k, d = self.source, self.size, self._known
        like = jnp.zeros(self.capacity, jnp.int32)
        compute: Any = probing.overlaps[source.distribution]
        small = compute(source.clock, self.basis, like, seed_word(source.seed))
        rows, gram = np.asarray(small[0])[: d + k, :k], np.asarray(small[1])[:k, :k]
        if source.distribution == "sphere":
            scale = np.sqrt(source.op.shape[0] / np.diag(gram))
            rows, gram = rows * scale, gram * np.outer(scale, scale)
        return Overlaps(rows[d:], gram - rows[:d].T @ rows[:d])

    def estimates(self) -> LeaveOneOut:
        """The leave-one-out estimates of the trace of P A P: XTrace, or, without H, XNysTrace."""
        with self.source.clock.part("host"):
            overlaps = self.overlaps()
            form, n = overlaps.basis.T @ self.factor, self.source.dimension
            check_form(form, self.frobenius)
            invariant = self.source.distribution != "rademacher"
            if not self._project:
                eps = self.source.eps
                return leave_one_out.xnystrace(form, self.factor, overlaps.gram, n, invariant, eps)
            return leave_one_out.xtrace(
                self.projected, self.factor, overlaps.basis, overlaps.gram, n, invariant
            )
