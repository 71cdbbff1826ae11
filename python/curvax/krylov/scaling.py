"""Operators at the ends of the floating-point range.

XLA and the kernels read numbers below the smallest normal one as zero (1.2e-38 in float32), so that
the products of an operator of that size vanish, and with them every residual; near the largest
number, sums overflow. But a product is linear: with powers of two s and t, `t A(s v)` is that of
`s t A` to the last bit, and nothing is lost on the way where s is about the root of `1/‖A‖`: then
vectors and products are equally far from both ends. So a computation is started as usual. Where its
first products, which it looks at anyway, are out of a safe range, it is started again on the scaled
operator, and its results are multiplied by `1/(s t)` on the host.
"""

import contextvars
import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from curvax.krylov import underflow
from curvax.krylov.underflow import Probe
from curvax.operators.base import Operator
from curvax.operators.checked_product import checked_product
from curvax.operators.space import VectorSpace
from curvax.program import Clock
from curvax.results.units import rescaled
from curvax.typing import DTypeLike

_R = TypeVar("_R")

# Exponents of two between which norms of products are safe: the roundings of products with vectors
# of 1e8 entries stay above the smallest normal number, and the squares of float64 in range.
_SAFE = {"float32": 64, "float64": 256}

# Whether the operator is taken as it is, whatever its products are.
_accepted = contextvars.ContextVar("accepted", default=False)

# The largest exponents of factors.
_LARGEST = {"float32": 120, "float64": 1000}

# How near to the best exponent a search ends.
_NEAR = 4


class OutOfRange(Exception):  # noqa: N818 - a signal, which no caller of the library sees
    """The products of an operator are too small or too large to compute with."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InRange(Operator):
    """`after · A · before`, which multiplies vectors by `before` and products by `after`.

    Attributes:
        inner: A.
        before: a power of two.
        after: a power of two.
    """

    inner: Operator
    before: Array
    after: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, op: Operator, before: int, after: int) -> "InRange":
        """`2**(before + after) · op`."""
        first, last = (jnp.asarray(2.0**e, op.dtype) for e in (before, after))
        return cls(op, first, last, op.space)

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        return checked_product(self.inner, block * self.before) * self.after


def exponent_of(op: Operator) -> int:
    """The e for which the operator is `2**e` times that which was asked about."""
    if not isinstance(op, InRange):
        return 0
    return sum(math.frexp(float(power))[1] - 1 for power in (op.before, op.after))


def check_range(op: Operator, norm: float) -> None:
    """Stop where products cannot be computed with; what `in_range` started starts again, scaled.

    Args:
        op: the operator.
        norm: the largest norm of a product of a unit vector that was seen.

    Raises:
        OutOfRange: they cannot.
    """
    if isinstance(op, InRange) or _accepted.get():
        return
    # NaN is of no size at all.
    if not is_safe(op.dtype, norm):
        raise OutOfRange


def is_safe(dtype: DTypeLike, norm: float) -> bool:
    """Whether numbers of this size can be computed with in `dtype`."""
    limit = _SAFE[np.dtype(dtype).name]
    return 2.0**-limit <= norm <= 2.0**limit


def in_range(
    op: Operator,
    attempt: Callable[[Operator], _R],
    convert: Callable[[_R, int], _R] = rescaled,
) -> _R:
    """What `attempt(op)` returns, computed with a multiple of `op` if that is necessary.

    The few products that find the multiple, and those of the attempt before, are not counted.

    Args:
        op: the operator.
        attempt: computes a result; called a second time, with another operator, where `check_range`
            stops it or a product is not finite.
        convert: turns a result of A into that of `2**exponent · A`.

    Raises:
        FloatingPointError: a product is not finite, whatever multiple is taken, or numbers in the
            operator are below the smallest normal number.
    """
    problem = None
    try:
        return attempt(op)
    except OutOfRange:
        pass
    except FloatingPointError as error:
        problem = error
    before, after = _exponents(op)
    if problem is not None and before == after == 0:
        raise problem
    del problem  # and the arrays that its traceback holds
    if before == after == 0:
        # Zero, or the start was in its null space: nothing is compiled again.
        token = _accepted.set(True)
        try:
            return attempt(op)
        finally:
            _accepted.reset(token)
    return convert(attempt(InRange.of(op, before, after)), -(before + after))


Told = TypeVar("Told")


def scaled_callback(
    op: Operator, callback: Callable[[Told], object] | None
) -> Callable[[Told], object] | None:
    """The callback, told of `op` what holds for the operator that was asked about."""
    exponent = exponent_of(op)
    if callback is None or exponent == 0:
        return callback
    return lambda progress: callback(rescaled(progress, -exponent))


def _exponents(op: Operator) -> tuple[int, int]:
    """The exponents of the factors before and after the operator; 0 where none is needed.

    Raises:
        FloatingPointError: numbers in the operator are below the smallest normal number.
    """
    probe = Probe(op, Clock())
    level = probe.level(0)
    if abs(level) <= _SAFE[op.dtype.name]:
        return 0, 0
    exponent = _search(probe.level, _LARGEST[op.dtype.name])
    if exponent is None:
        return 0, 0
    underflow.check(op, probe, exponent)
    level = probe.level(exponent)
    # No matrix of finite numbers is larger than this.
    largest = int(jnp.finfo(op.dtype).maxexp) + math.log2(op.shape[0])
    if not math.isfinite(level) or level - exponent > largest:
        return 0, 0
    return exponent, -round(level)


def _search(level: Callable[[int], float], largest: int) -> int | None:
    """The exponent for vectors at which these and products are equally far from both ends.

    Args:
        level: the logarithm of the norm of products for an exponent; −∞ where they vanish, NaN
            where they are not finite.
        largest: the largest exponent.

    Returns:
        Where all products vanish that are finite, the largest exponent of such; None where none is.
    """
    low, high, best, exponent = -largest - 1, largest + 1, None, 0
    while low < exponent < high:
        size = level(exponent)
        if size == -math.inf:
            low = exponent
        elif math.isnan(size):
            high = exponent
        else:
            best, wanted = exponent, round((exponent - size) / 2)
        if best is None:
            open_end = high > largest, low < -largest
            exponent = largest if open_end[0] else -largest if open_end[1] else (low + high) // 2
            continue
        # Casts to float16 in a model leave less room than the operator's own dtype.
        exponent = wanted if low < wanted < high else (best + (high, low)[wanted <= low]) // 2
        if abs(exponent - best) <= _NEAR:
            return best
    return low if best is None and low >= -largest else best
