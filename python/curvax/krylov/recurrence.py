"""The plain Lanczos recurrence: b independent runs side by side, three vectors each, no basis.

One step of one run, with q the current vector, p the previous one and A q their product:

    α  = qᵀ (A q − β p)
    β' q' = A q − β p − α q,   ‖q'‖ = 1

which in exact arithmetic gives the tridiagonal projection T of A onto the Krylov space, with the αs
on its diagonal and the βs beside it. In floating point the vectors lose their orthogonality as soon
as a Ritz value converges, and that value comes back as a "ghost". Nothing is reorthogonalised
here: T is then the exact projection of a matrix whose eigenvalues lie in tiny clusters about those
of A, so that the quadrature (nodes: the eigenvalues of T, weights: the squared first entries of its
eigenvectors) stays right, a ghost and its origin sharing one weight. A. Greenbaum, "Behavior of
slightly perturbed Lanczos and conjugate-gradient recurrences", Linear Algebra Appl. 113 (1989);
G. Golub and G. Meurant, "Matrices, Moments and Quadrature" (2010), chapter 4; T. Chen, T. Trogdon
and S. Ubaru, "Analysis of stochastic Lanczos quadrature" (2021), section 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.columns import over_columns
from curvax.device.probing import project_off
from curvax.device.programs import multiply
from curvax.krylov.scaling import check_range
from curvax.operators.base import Operator
from curvax.operators.evidence import check_symmetry, report_nonfinite
from curvax.ops.inner_products import Rows, row_products
from curvax.program import Clock, host, program
from curvax.typing import Float64Array

# A run ends where β is at most this multiple of the roundoff of the largest coefficient so far.
# What is left of a product on an invariant subspace measures 0.3 to 3. A miss does no harm: the
# weights beyond it are the square of this. A false alarm would: next to outliers 10⁵ times as
# large, the βs of a bulk are this small.
BREAKDOWN = 4.0


class Recurrence:
    """b runs of the recurrence, and the coefficients that they have given.

    Holds three blocks of vectors: previous, current and product.

    With `deflated`, orthonormal rows X, the runs are those of A on the complement of X: the starts
    lie in it, and what each step leaves is projected back onto it. Without that, rounding would
    bring the eigenvalues left out back within a few steps, and many nodes would be spent on them;
    with the product projected instead, zero would take their place.

    Attributes:
        steps: steps made; each multiplies b vectors.
        ended: `(b,)` bool, the runs whose Krylov space is invariant. Their later coefficients are
            zero.
    """

    def __init__(
        self, op: Operator, start: Array, clock: Clock, deflated: Array | None = None
    ) -> None:
        """Begin with unit vectors `(b, n)`, which are kept."""
        self.op = op
        self._deflated = deflated
        self.clock = clock
        self.steps = 0
        self.ended = np.zeros(len(start), bool)
        self._current = start
        # Multiplied by β = 0 in the first step.
        self._previous = start
        self._beta = np.zeros(len(start))
        self._scale = np.zeros(len(start))
        self._longest = 0.0
        self._alphas: list[Float64Array] = []
        self._betas: list[Float64Array] = []

    def step(self) -> None:
        """Multiply the current vectors and go on by one.

        In the second step `pᵀA q`, with the first vector p, is compared with `qᵀA p`.

        Raises:
            FloatingPointError: the product is not finite.
            OutOfRange: see `check_range`.
            ValueError: the operator is not symmetric.
        """
        with self.clock.part("products"):
            # Compiled once for this and for `eigsh`, which gives the vectors away.
            given = jnp.copy(self._current)
            product = jax.block_until_ready(multiply(self.clock, self.op, given))
        before = self._beta
        with self.clock.part("recurrence"):
            rest, along, *more = subtract(
                self.clock, product, self._previous, self._current, host(self._beta)
            )
            if self._deflated is not None:
                rest = project_off(self.clock, self._deflated, rest)
            following, *small = advance(self.clock, rest, along, host(self._scale))
            self._beta, self._scale = (np.asarray(x) for x in small)
            alpha, back, overlap = (np.asarray(x) for x in (along, *more))
        self._previous, self._current = self._current, following
        if not np.isfinite(alpha + self._beta).all():
            # The product, overwritten, is made once more.
            again = multiply(self.clock, self.op, self._previous)
            report_nonfinite(self.op, again, (self.steps + 1) * len(alpha))
        if self._deflated is None:
            # What known pairs leave may be zero; they are checked by a product of their own.
            lengths = np.hypot(np.hypot(alpha, self._beta), before)
            self._longest = max(self._longest, float(lengths.max()))
            check_range(self.op, self._longest)
        if self.steps == 1 and self._deflated is None:
            # Later, and beside what is left out, roundings may be as large as this product.
            forth = before + self._alphas[0] * overlap
            for difference, scale in zip(np.abs(back - forth), self._scale, strict=True):
                check_symmetry(float(difference), float(scale))
        self.steps += 1
        self.ended = self.ended | (self._beta == 0)
        self._alphas.append(alpha)
        self._betas.append(self._beta)

    @property
    def current(self) -> Array:
        """`(b, n)` the vectors to be multiplied next; zero for runs that have ended."""
        return self._current

    def coefficients(self, run: int) -> tuple[Float64Array, Float64Array]:
        """The αs and the βs of a run, both `(j,)`, up to where it ended.

        The last β couples to the vector after the last: 0 if the space is invariant.
        """
        alphas = np.asarray([alpha[run] for alpha in self._alphas])
        betas = np.asarray([beta[run] for beta in self._betas])
        zeros = np.flatnonzero(betas == 0)
        length = int(zeros[0]) + 1 if zeros.size else self.steps
        return alphas[:length], betas[:length]


@program(donate=(0,), wide=True)
def subtract(
    product: Array, previous: Array, current: Array, beta: Array
) -> tuple[Array, Array, Array, Array]:
    """The product less its components along the current and the previous vector.

    Args:
        product: `(b, n)`, donated.
        previous: `(b, n)`.
        current: `(b, n)`.
        beta: `(b,)` float64, what couples the two.

    Returns:
        The rest, in the memory of the product; α `(b,)`, a sum in float64; and likewise the inner
        products of the previous vector with the product, and with the current one.
    """
    b, n = product.shape
    w, p, q = np.arange(3 * b).reshape(3, b)
    pairs = np.hstack([(w, q), (p, q), (w, p)]).T
    rows = [Rows.all_of(x) for x in (product, previous, current)]
    along, overlap, back = row_products(rows, pairs, n).reshape(3, b)
    alpha = along - beta * overlap
    # In float64 this would cost more than the rest of the step.
    narrow_alpha, narrow_beta = (x[:, None].astype(product.dtype) for x in (alpha, beta))

    def fill(out: Array, first: Array, width: int) -> Array:
        w, p, q = (_columns(x, first, width) for x in (out, previous, current))
        piece = w - (narrow_beta * p + narrow_alpha * q)
        return lax.dynamic_update_slice_in_dim(out, piece, first, axis=1)

    return over_columns(fill, product, n, rows=2 * b), alpha, back, overlap


@program(donate=(0,), wide=True)
def advance(rest: Array, alpha: Array, scale: Array) -> tuple[Array, Array, Array]:
    """What `subtract` left, as unit vectors.

    Args:
        rest: `(b, n)`, donated.
        alpha: `(b,)` float64.
        scale: `(b,)` float64, the largest coefficient so far.

    Returns:
        The next vectors, zero where a run ends; β, exactly 0 where a run ends; the new scale.
    """
    beta = _norms(rest)
    scale = jnp.maximum(scale, jnp.maximum(jnp.abs(alpha), beta))
    beta = jnp.where(beta <= BREAKDOWN * float(jnp.finfo(rest.dtype).eps) * scale, 0, beta)
    return _scaled(rest, jnp.where(beta == 0, 0, 1 / beta)), beta, scale


@program(donate=(0,), wide=True)
def normalize(block: Array) -> Array:
    """Rows of a donated block, divided by their norms."""
    return _scaled(block, 1 / _norms(block))


def _norms(block: Array) -> Array:
    b, n = block.shape
    return jnp.sqrt(row_products([Rows.all_of(block)], [(i, i) for i in range(b)], n))


def _columns(block: Array, first: Array, width: int) -> Array:
    return lax.dynamic_slice_in_dim(block, first, width, axis=1)


def _scaled(block: Array, factors: Array) -> Array:
    """Rows times factors of float64, in place."""
    narrow = factors[:, None].astype(block.dtype)

    def fill(out: Array, first: Array, width: int) -> Array:
        piece = _columns(out, first, width) * narrow
        return lax.dynamic_update_slice_in_dim(out, piece, first, axis=1)

    return over_columns(fill, block, block.shape[1], rows=block.shape[0])
