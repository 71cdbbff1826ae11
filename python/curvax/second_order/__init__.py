"""Derivative rules, of code that is not JAX's, that can be differentiated once more.

`TwiceDifferentiable` is for scalars, `TwiceDifferentiableMap` for arrays.
"""

from curvax.second_order.maps import TwiceDifferentiableMap, VectorMap
from curvax.second_order.scalars import ScalarLoss, TwiceDifferentiable

__all__ = ["ScalarLoss", "TwiceDifferentiable", "TwiceDifferentiableMap", "VectorMap"]
