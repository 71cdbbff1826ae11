"""Types for annotations: pytrees by their role, arrays by their shape.

A shape stands beside an array in jaxtyping's notation: `Float[Array, "b n"]` is a block of b flat
vectors of n elements. Type checkers see the array alone; the tests check the shapes.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jax import Array
from jax.tree_util import PyTreeDef as PyTreeDef
from jax.typing import ArrayLike
from jax.typing import DTypeLike as DTypeLike
from jaxtyping import Float
from jaxtyping import PyTree as PyTree

# Of real floating arrays: what a function is differentiated in.
Params: TypeAlias = PyTree
# With the structure and the shapes of the parameters, None where a filter leaves one out.
Vector: TypeAlias = PyTree
# The same with a leading axis, of the vectors.
Block: TypeAlias = PyTree
# Whatever the loss takes beside the parameters, or the outputs.
Batch: TypeAlias = PyTree
# One batch, a list of them, or an iterator over them.
Batches: TypeAlias = PyTree
Scalar: TypeAlias = Float[Array, ""]
# What a loss returns: the mean, or the mean and the weight that it counts for.
LossValue: TypeAlias = Scalar | tuple[Scalar, Scalar]

# One size for all axes, or one for each.
Sizes: TypeAlias = int | Sequence[int]

FloatArray: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.floating]]
# Of one number, too.
Numbers: TypeAlias = FloatArray | np.floating
# Where a function of a number is evaluated.
Points: TypeAlias = ArrayLike | Sequence[float]
BoolArray: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
IntArray: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.integer]]
Float64Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
