"""Which eigenvalues a Krylov space from a random start can no longer hide.

Let u be a unit eigenvector, of the eigenvalue μ. Times u, the decomposition `A Q = Q T + Q_new E`
of `lanczos` says

    y (μ − T) = c E,   y = uᵀQ (1, m),  c = uᵀQ_new (1, b),  so  y = c E (μ − T)⁻¹

for what u has in the basis. The part of y in the block with which a cycle between two restarts
began is the c of the cycle before: `c_before = c K`, with the b × b matrix K of that block's
columns. So the components of u in the starting block are `c · K_last ⋯ K_first`, and ‖c‖ ≤ 1. Once
that product is so small that those of a random block are not, but for an event of small
probability, there is no such eigenvalue. For one vector and no restart that is the probabilistic
bound of J. van Dorsselaer, M. Hochstenbach and H. van der Vorst, "Computing probabilistic bounds
for extreme eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal. Appl.
22 (2000), section 3: K⁻¹ is then the Lanczos polynomial at μ.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curvax.typing import Float64Array

# What a product of many small matrices resolves, relative to its norm: each is measured in float32
# arithmetic, and a direction that has grown far more than another is then rounding alone.
_RESOLVED = 1e-3


class Cycle(NamedTuple):
    """The decomposition at the end of a cycle, in Ritz vectors.

    Attributes:
        values: `(m,)` Ritz values.
        ends: `(b, m)` E, their couplings to the next block.
        begins: `(b, m)` the components of the block with which the cycle began.
    """

    values: Float64Array
    ends: Float64Array
    begins: Float64Array


def log_growth(mu: float, cycles: Sequence[Cycle]) -> float:
    """The logarithm of the growth, since the start, of an eigenvector of the eigenvalue `mu`.

    `−log σ_min(K_last ⋯ K_first)`: that of the direction in the starting block that has grown most,
    which any random component all but surely has a part of. Infinite where the Krylov space has
    closed.
    """
    if not cycles:
        return 0.0
    product, logarithm = np.eye(len(cycles[0].ends)), 0.0
    for values, ends, begins in cycles:
        gaps = mu - values
        gaps = np.where(gaps == 0, np.finfo(np.float64).tiny, gaps)
        product = (ends / gaps) @ begins.T @ product
        size = float(np.linalg.norm(product))
        if size == 0 or not math.isfinite(size):
            return math.inf if size == 0 else -math.inf
        product, logarithm = product / size, logarithm + math.log(size)
    least = float(np.linalg.svd(product, compute_uv=False)[-1])
    return -logarithm - math.log(max(least, _RESOLVED))


def needed_growth(n: int, weight: float, odds: float) -> float:
    """The logarithm of the growth after which an eigenvector would show.

    Args:
        n: the dimension. A random unit vector has the component g/√n, g standard normal.
        weight: of the random vector in the start.
        odds: the eigenvector's |g| is below this with a probability of 0.8 times it.
    """
    return 0.5 * math.log(n) - math.log(weight * odds)
