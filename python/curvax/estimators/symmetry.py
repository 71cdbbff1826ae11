"""What shows that an operator is not symmetric, from products that are made anyway."""

from typing import Any

import numpy as np

from curvax.krylov.lanczos import ASYMMETRY_LIMIT


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


def check_form(form: np.ndarray[Any, Any], size: float) -> None:
    """Check what should be the quadratic form of a symmetric operator on some vectors.

    Args:
        form: `(k, k)`.
        size: of the operator, where its form may vanish on the vectors.

    Raises:
        ValueError: the operator is not symmetric.
    """
    check_symmetry(float(np.abs(form - form.T).max()), max(float(np.abs(form).max()), size))
