"""What is said of products that are not finite."""

from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import Array

from curvax.operators.base import Operator


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
