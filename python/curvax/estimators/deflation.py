"""Deflation: what a solve's vectors tell an estimate beforehand, measured anew."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.blas import one_thread
from curvax.device import probing, programs
from curvax.estimators.arguments import ROUNDINGS
from curvax.krylov.scaling import check_range, exponent_of
from curvax.operators.algebra import orthonormal_rows
from curvax.operators.base import Operator
from curvax.operators.evidence import report_nonfinite
from curvax.operators.vectors import read_rows
from curvax.program import Clock
from curvax.results import EigenResult
from curvax.results.units import rescaled
from curvax.typing import Float64Array

# Roundings of a product, in units of eps times the size of the values, that pairs are checked to.
_PAIRS_ROUNDING = 1e3


@dataclasses.dataclass(frozen=True)
class Deflation:
    """The part of a trace that a solve's vectors give, measured on the operator at hand.

    With X the vectors and P = I − XᵀX, `tr A = tr(X A Xᵀ) + tr(P A P)`, whether or not they are
    eigenvectors, and whichever operator they were found for.

    Attributes:
        vectors: `(d, n)` orthonormal rows X, or None.
        count: d.
        form: `(d, d)` float64, `X A Xᵀ`.
        leaks: `(d,)` the norms of `P A x`.
        atoms: `(d,)` float64, the eigenvalues of the form; those of the solve where they differ by
            no more than the products' roundings.
        rounding: what errors of the products may amount to in the trace of the form.
        matvecs: products made to measure all that.
    """

    vectors: Array | None = None
    count: int = 0
    form: Float64Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    leaks: Float64Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    atoms: Float64Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    rounding: float = 0.0
    matvecs: int = 0

    @property
    def value(self) -> float:
        """The part of the trace on their span."""
        return float(np.sum(self.atoms))

    @classmethod
    def of(cls, op: Operator, result: EigenResult | None, block: int, clock: Clock) -> "Deflation":
        """Take the vectors of a result, and multiply them.

        Raises:
            TypeError: not an `EigenResult`.
            ValueError: no vectors, too many, values not certified, or pairs of another operator.
        """
        if result is None:
            return cls()
        if isinstance(result, EigenResult):
            result = rescaled(result, exponent_of(op))
        rows = orthonormal_rows(_rows(op, result))
        form, leaks, matvecs = _multiply_rows(op, rows, block, clock)
        values = np.asarray(result.eigenvalues, np.float64)
        check_range(op, float(max(np.abs(values).max(), np.abs(form).max())))
        size, eps = float(np.linalg.norm(values)), float(jnp.finfo(op.dtype).eps)
        _check_pairs(op, result, form, leaks, _PAIRS_ROUNDING * eps * size)
        noise = float(np.linalg.norm(form - form.T)) / 2
        form = (form + form.T) / 2
        with one_thread():
            atoms = np.asarray(np.linalg.eigvalsh(form)[::-1], np.float64)
        if np.abs(atoms - values).max() <= ROUNDINGS * eps * size:
            atoms = values
        gram = np.asarray(probing.inner(clock, rows, rows))
        skew = float(np.abs(gram - np.eye(len(gram))).max()) * float(np.sum(np.abs(atoms)))
        rounding = ROUNDINGS * eps * size + noise + skew
        return cls(rows, len(rows), form, leaks, atoms, rounding, matvecs)


def _multiply_rows(
    op: Operator, rows: Array, block: int, clock: Clock
) -> tuple[Float64Array, Float64Array, int]:
    """`X A Xᵀ` as computed, the norms of what the products leave beside X, and their number."""
    d = len(rows)
    form, leaks, made = np.zeros((d, d)), np.zeros(d), 0
    for first in range(0, d, block):
        # Whole blocks: for another number of vectors the product is compiled again.
        picked = np.arange(first, first + block) % d
        taken = programs.take(clock, rows, jnp.asarray(picked, jnp.int32))
        products = programs.multiply(clock, op, taken)
        made += block
        form[:, picked] = np.asarray(probing.inner(clock, rows, products))
        if not np.isfinite(form[:, picked]).all():
            report_nonfinite(op, products, made)
        left = probing.project_off(clock, rows, products)
        leaks[picked] = np.sqrt(np.asarray(probing.forms(clock, left, left)[2]))
    return form, leaks, made


def _rows(op: Operator, result: object) -> Array:
    if not isinstance(result, EigenResult):
        raise TypeError(
            f"deflate must be an EigenResult, as eigsh returns, got {type(result).__name__}"
        )
    if not result.certified:
        raise ValueError(
            "deflate must hold values of this operator, but these are means over microbatches: "
            "solve with eigsh, or power_iteration without resample"
        )
    flat = read_rows(op.space, result, "deflate")
    if len(flat) >= op.shape[0]:
        raise ValueError(
            f"deflate must hold fewer pairs than n = {op.shape[0]}, got {len(flat)}: their "
            "eigenvalues are the trace"
        )
    return flat


def _check_pairs(
    op: Operator, result: EigenResult, form: Float64Array, leaks: Float64Array, rounding: float
) -> None:
    """Compare products of a result's vectors with what its values and residuals say.

    Raises:
        ValueError: they are further from the values than the residuals allow.
    """
    values = np.asarray(result.eigenvalues, np.float64)
    rest = math.hypot(float(np.linalg.norm(form - np.diag(values))), float(np.linalg.norm(leaks)))
    skew = result.orthogonality * float(np.sum(np.abs(values)))
    allowed = 3 * float(np.sum(result.residuals)) + skew + rounding
    if not rest <= allowed:
        unit = 0.5 ** exponent_of(op)
        raise ValueError(
            f"deflate must hold pairs of this very operator: the residuals ‖A xᵢ − λᵢ xᵢ‖ are "
            f"{unit * rest:.2g} together, where those of the result allow {unit * allowed:.2g}; "
            "solve again for "
            "other parameters, batches or filters"
        )
