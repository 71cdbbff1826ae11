"""What shows, from products that are made anyway, that an operator is broken."""

from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.operators.base import Operator

# Above this relative asymmetry the operator is not symmetric: a 16-bit model's noise stays below.
ASYMMETRY_LIMIT = 1e-2


def report_nonfinite(op: Operator, products: Array, number: int) -> NoReturn:
    """Name the leaves in which products are not finite.

    Args:
        op: the operator that made them.
        products: `(b, n)`, as they were or made once more.
        number: how many products there had been.

    Raises:
        FloatingPointError: always.
    """
    leaves = jax.tree.leaves(op.unravel(products))
    counts = [
        (name, int(jnp.sum(~jnp.isfinite(leaf))), leaf.size)
        for name, leaf in zip(op.space.names, leaves, strict=True)
    ]
    bad = [f"{name or 'the vector'} ({c} of {size})" for name, c, size in counts if c]
    raise FloatingPointError(
        f"product {number} of the operator is not finite; NaN or infinite entries in: "
        f"{', '.join(bad) or 'none when repeated, so the products are not deterministic'}"
    )


def check_symmetry(difference: float, scale: float) -> None:
    """Check that some vectors u and v show no asymmetry.

    Args:
        difference: the largest `|uᵀAv − vᵀAu|`.
        scale: how large `uᵀAv` may be. Where that or the difference is NaN, nothing is said.

    Raises:
        ValueError: the operator is not symmetric.
    """
    if difference > ASYMMETRY_LIMIT * scale:
        raise ValueError(
            f"A must be symmetric: |uᵀAv − vᵀAu| is {difference / scale:.2g} of the size of uᵀAv; "
            "if the operator is symmetric in exact arithmetic, its products are too inaccurate "
            "(dropout, resampled batches, low precision?)"
        )


def check_form(form: np.ndarray, size: float) -> None:
    """Check what should be the quadratic form of a symmetric operator on some vectors.

    Args:
        form: `(k, k)`.
        size: of the operator, where its form may vanish on the vectors.

    Raises:
        ValueError: the operator is not symmetric.
    """
    check_symmetry(float(np.abs(form - form.T).max()), max(float(np.abs(form).max()), size))
