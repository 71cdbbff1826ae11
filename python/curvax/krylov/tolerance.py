"""How large a residual may be: relative to what, and never below what arithmetic can show."""

import numpy as np

from curvax.device import storage
from curvax.krylov.selection import Wanted
from curvax.operators.base import Operator
from curvax.operators.evidence import ASYMMETRY_LIMIT
from curvax.operators.precision import more_accurate
from curvax.typing import DTypeLike, Float64Array
from curvax.warnings import warn

RELATIVE_TO = ("largest", "end", "each")


class Tolerance:
    """The residual allowed of each wanted pair.

    Pair i may have `max(tol · reference_i, floor · |λ|max)`. The reference is |λ|max (`"largest"`),
    the outermost value of the pair's end of the spectrum (`"end"`), or the value itself
    (`"each"`). The floor is tol², or what dtype, storage and noise allow if that is more. An
    `"end"` that does not reach beyond zero, and whose outermost value is zero within its residual,
    as that of a semidefinite matrix, has no value to be relative to: the reference is |λ|max.
    """

    def __init__(
        self, wanted: Wanted, tol: float, relative_to: str, dtype: DTypeLike, basis_dtype: DTypeLike
    ) -> None:
        self._wanted = wanted
        self._asked = tol
        self._relative_to = relative_to
        self._dtype = np.dtype(dtype)
        self._basis_dtype = np.dtype(basis_dtype)
        self._floor = attainable(dtype, basis_dtype)

    @property
    def of_largest(self) -> float:
        """What is allowed of a pair whose reference is |λ|max, relative to that."""
        return max(self._asked, self._floor)

    def allowed(self, values: Float64Array, residuals: Float64Array, scale: float) -> Float64Array:
        """The residual allowed of each pair; see `parts`."""
        return scale * self.parts(values, residuals, scale)

    def parts(self, values: Float64Array, residuals: Float64Array, scale: float) -> Float64Array:
        """The residual allowed of each pair, in units of |λ|max.

        Args:
            values: `(j,)` the first j wanted values in the order of preference, j up to k.
            residuals: `(j,)` their residuals.
            scale: |λ|max.
        """
        if self._relative_to == "largest" or scale == 0:
            return np.full(len(values), self.of_largest)
        floor = max(min(self._asked, self._asked**2), self._floor)
        references = np.abs(values) / scale
        ends = self._wanted.ends(values) if self._relative_to == "end" else []
        for outward, place, _ in ends:
            if not len(outward[place]):
                continue
            first = place.start + int(np.argmax(outward[place]))
            # By magnitude no end has an inner side.
            inside = self._wanted.which != "LM" and outward[first] <= floor * scale
            zero = inside and abs(values[first]) <= max(residuals[first], floor * scale)
            references[place] = 1.0 if zero else abs(values[first]) / scale
        return np.maximum(self._asked * references, floor)

    def admit(self, noise: float) -> None:
        """Raise the floor to what the measured noise of the products, relative to |λ|max, allows.

        Twice the noise, since that is measured on a few vectors; but noise that an operator of a
        symmetric matrix cannot have excuses nothing.
        """
        self._floor = max(self._floor, min(2 * noise, 2 * ASYMMETRY_LIMIT))

    def warn_if_raised(self, op: Operator) -> None:
        """Warn if the floor lies above a tolerance, unless that was 0, which asks for just it.

        Args:
            op: whose products they are.
        """
        if not self.of_largest > self._asked > 0:
            return
        where, remedy = f"the noise of the products in {self._dtype.name}", "tol_effective"
        if storage.floor(self._basis_dtype):
            where = f"a basis stored in {self._basis_dtype.name}"
            remedy = f"tol_effective; basis_dtype={self._dtype.name!r} allows less"
        noisy = self._floor > attainable(self._dtype, self._basis_dtype)
        warn(
            f"tol = {self._asked:.3g} is below what {where} allows; {self.of_largest:.3g} was "
            f"applied (see {remedy}){more_accurate(op) if noisy else ''}"
        )


def attainable(dtype: DTypeLike, basis_dtype: DTypeLike) -> float:
    """The relative residual of products in `dtype`, on stored vectors, that can be relied on."""
    return max(4 * float(np.finfo(dtype).eps), storage.floor(basis_dtype))
