"""Sums of matrix products, with no copy of an operand or of the array that is added to."""

from curvax.ops.matmul_sum.api import matmul_sum

__all__ = ["matmul_sum"]
