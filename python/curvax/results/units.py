"""Results of an operator as results of a multiple of it, by a power of two: nothing is rounded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.results.blocks import BlockResults
from curvax.results.density import SpectralDensity
from curvax.results.eigen import EigenResult, Progress
from curvax.results.estimates import (
    DiagonalResult,
    LanczosTridiagonal,
    TraceProgress,
    TraceResult,
)

# The fields in units of an eigenvalue, and of its inverse.
_DIRECT: dict[type, tuple[str, ...]] = {
    EigenResult: ("eigenvalues", "residuals", "estimated_errors"),
    TraceResult: ("estimate", "stderr", "interval", "samples"),
    DiagonalResult: ("estimate", "stderr"),
    LanczosTridiagonal: ("alphas", "betas", "last_beta"),
    SpectralDensity: (
        "grid",
        "width",
        "nodes",
        "atoms",
        "outliers",
        "residuals",
        "rounding",
        "coupling",
    ),  # fmt: skip
    Progress: ("largest",),
    TraceProgress: ("estimate", "stderr", "until"),
}
_INVERSE: dict[type, tuple[str, ...]] = {SpectralDensity: ("density", "lower", "upper")}


def rescaled(result: Any, exponent: int) -> Any:
    """What was found, or reported on the way, of an operator A, as that of `2**exponent · A`."""
    if exponent == 0 or result is None:
        return result
    if isinstance(result, BlockResults):
        blocks = {name: rescaled(block, exponent) for name, block in result.items()}
        return BlockResults(blocks, result.sizes)
    kind = type(result)
    changed = {name: times(getattr(result, name), exponent) for name in _DIRECT[kind]}
    for name in _INVERSE.get(kind, ()):
        changed[name] = times(getattr(result, name), -exponent)
    if isinstance(result, tuple):
        return result._replace(**changed)  # type: ignore[attr-defined]
    if hasattr(result, "history"):
        changed["history"] = tuple(rescaled(progress, exponent) for progress in result.history)
    return dataclasses.replace(result, **changed)


def times(tree: Any, exponent: int) -> Any:
    """`2**exponent · tree`, on the host, where small numbers are not flushed to zero."""

    def one(leaf: Any) -> Any:
        # What is beyond the largest number is infinite, as it should be.
        with np.errstate(over="ignore"):
            product = np.ldexp(np.asarray(leaf), exponent)
        if isinstance(leaf, jax.Array):
            return jnp.asarray(product)
        return product if isinstance(leaf, np.ndarray) else float(product)

    return jax.tree.map(one, tree)
