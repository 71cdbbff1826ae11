"""Attention: the output, its derivatives, and derivatives of these, with no calculus of JAX's.

Each function takes the name of the implementation first, and then what that of `tiled` takes.
"""

from curvax.ops.attention.api import bend, check_impl, curvature, forward, pullback, tangents
from curvax.ops.attention.options import Masks, Options

__all__ = [
    "Masks",
    "Options",
    "bend",
    "check_impl",
    "curvature",
    "forward",
    "pullback",
    "tangents",
]
