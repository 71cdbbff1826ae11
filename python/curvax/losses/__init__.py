"""Losses whose second derivatives are fused, exact, and hold no tokens × vocabulary array.

Each is the weighted mean over the labels that are not ignored. A mean over no label is NaN, and so
is the loss of a label that names no class, where that cannot be raised (under `jit`).

The functions take arrays. The classes are the same losses as functions of a model's outputs and a
batch, for `curvax.ggn`; they multiply by their own Hessian.
"""

from curvax.losses.functions import linear_cross_entropy, mse, softmax_cross_entropy
from curvax.losses.objects import (
    LinearCrossEntropy,
    Loss,
    MeanSquaredError,
    SoftmaxCrossEntropy,
)

__all__ = [
    "LinearCrossEntropy",
    "Loss",
    "MeanSquaredError",
    "SoftmaxCrossEntropy",
    "linear_cross_entropy",
    "mse",
    "softmax_cross_entropy",
]
