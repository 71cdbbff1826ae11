"""Softmax cross entropy of rows of logits: losses, gradient and Hessian products.

`softmax_ce_hvp` and `softmax_ce_derivatives` take the options of the loss by keyword; `hvp` and
`derivatives` are the same with `Options` that are made already.
"""

from curvax.ops.softmax_ce.api import (
    derivatives,
    hvp,
    softmax_ce_derivatives,
    softmax_ce_hvp,
)
from curvax.ops.softmax_ce.options import Options
from curvax.ops.softmax_ce.reference import cap, losses

__all__ = [
    "Options",
    "cap",
    "derivatives",
    "hvp",
    "losses",
    "softmax_ce_derivatives",
    "softmax_ce_hvp",
]
