"""Hessian-vector products by central differences of the gradient.

For losses that have no second derivative in JAX. With the gradient g and the step h,

    H v ≈ (g(θ + h v) − g(θ − h v)) / 2h        error  h² ‖∂³L‖ / 6 + noise(g) / h

which is least for h ~ eps^(1/3). The perturbation must be that small a part of the parameters it
moves, whatever the length of v: after Brown & Saad 1990 ("Hybrid Krylov methods for nonlinear
systems of equations", section 3.2) h = c · Σ|vᵢ| max(|θᵢ|, typical) / ‖v‖², where `typical` is the
root mean square of the parameters and c is a power of two times eps^(1/3), chosen by measurement.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from curvax.arrays import scale_of
from curvax.checks import check_number
from curvax.operators.checked_product import compiled_product
from curvax.operators.closure import Closed
from curvax.operators.curvature import Curvature, Stack
from curvax.operators.microbatch import LossMap
from curvax.operators.products import Call, OneByOne
from curvax.options import takes_options
from curvax.typing import Batch, Batches, Params
from curvax.warnings import warn

# The steps tried, in units of eps^(1/3): powers of two with these exponents.
_EXPONENTS = range(-4, 4)

# Errors of a product above this part of it are told of.
_LARGE_ERROR = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DifferenceHessian(Curvature):
    """The Hessian by central differences of the gradient.

    Attributes:
        relative_error: an estimate of the error of a product, with the step h that was chosen: the
            largest of `‖D(h) v − D(2h) v‖ / ‖D(h) v‖` for a random v and for its product, from
            above where truncation rules; and of `|uᵀD(h) v − vᵀD(h) u|`, relative, for the same v
            and a u whose entries are as large as those of the parameters. The latter shows a step
            that is small beside some parameters, and too large for others. NaN where the operator
            is made under `jit`, and with another step or other parameters than at first.
    """

    relative_error: object = np.float32("nan")

    @property
    def relative_step(self) -> Array:
        """The step, as a part of the parameters that it moves."""
        return _differences(self.stacks[0]).relative_step

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> "DifferenceHessian":
        """See `Curvature.at`; the step stays, and its error there is not measured."""
        moved = super().at(params, batches=batches)
        return dataclasses.replace(moved, relative_error=np.float32("nan"))

    def with_step(self, relative_step: object) -> "DifferenceHessian":
        """The same with another step, of an error that is not known; nothing is compiled again.

        Raises:
            TypeError: not a number.
            ValueError: not positive, or not finite.
        """
        if not isinstance(relative_step, Array):
            relative_step = check_number("relative_step", relative_step, positive=True)
        step = jnp.asarray(relative_step, self.relative_step.dtype)
        moved = [
            dataclasses.replace(_differences(stack), relative_step=step) for stack in self.stacks
        ]
        stacks = tuple(
            dataclasses.replace(stack, product=product)
            for stack, product in zip(self.stacks, moved, strict=True)
        )
        return dataclasses.replace(self, stacks=stacks, relative_error=np.float32("nan"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Differences(OneByOne):
    """By two gradients per product; nothing is kept.

    Attributes:
        quotient: `(leaves, batch, tangents, relative_step) -> products`.
        relative_step: scalar float32, the step as a part of the parameters that it moves.
    """

    quotient: Closed
    relative_step: Array

    def program(self, leaves: Sequence[Array], batch: Batch) -> Call:
        """See `OneByOne`."""
        return self.quotient, jax.tree.leaves((leaves, batch)), [self.relative_step]


@dataclasses.dataclass(frozen=True)
class DifferenceMap(LossMap):
    """The Hessian of one microbatch, by differences."""

    def recomputing(self, leaves: Sequence[Array], batch: Batch) -> Differences:
        """See `MicrobatchMap`."""
        narrowest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in self.taken(leaves))
        step = jnp.asarray(narrowest ** (1 / 3), jnp.float32)
        types = self.tangents(leaves)
        quotient = self.traced(self._difference, leaves, batch, types, step)
        return Differences(self.value(leaves, batch), (), quotient, step)

    def _difference(
        self, leaves: Sequence[Array], batch: Batch, tangents: list[Array], relative_step: Array
    ) -> list[Array]:
        gradient, taken = self.gradient(leaves, batch), self.taken(leaves)
        tangents = self.cast(tangents, leaves)
        h = _step(taken, tangents, relative_step)

        def moved(sign: int) -> list[Array]:
            steps = [sign * h.astype(t.dtype) * t for t in tangents]
            out, _ = gradient([leaf + s for leaf, s in zip(taken, steps, strict=True)])
            return list(out)

        pairs = zip(moved(1), moved(-1), strict=True)
        return [(plus - minus) / (2 * h).astype(plus.dtype) for plus, minus in pairs]


def _differences(stack: Stack) -> Differences:
    assert isinstance(stack.product, Differences)
    return stack.product


def _step(params: Sequence[Array], tangents: Sequence[Array], relative: Array) -> Array:
    """The step h for a tangent; 1 where it is zero."""
    wide = jnp.float64 if any(p.dtype == jnp.float64 for p in params) else jnp.float32
    count = sum(p.size for p in params)

    def total(terms: Sequence[Array]) -> Array:
        return jnp.stack([jnp.sum(term) for term in terms]).sum()

    v = [t.astype(wide) for t in tangents]
    longest = scale_of(jnp.stack([jnp.max(jnp.abs(t), initial=0) for t in v]))
    v = [t / longest for t in v]
    theta = [p.astype(wide) for p in params]
    mean_square = total([p * p for p in theta]) / count
    typical = jnp.where(mean_square > 0, jnp.sqrt(mean_square), 1)
    pairs = zip(v, theta, strict=True)
    reach = total([jnp.abs(t) * jnp.maximum(jnp.abs(p), typical) for t, p in pairs])
    square = total([t * t for t in v])
    h = relative.astype(wide) * reach / jnp.where(square > 0, square, 1) / longest
    return jnp.where(square > 0, h, 1)


def tuned(op: DifferenceHessian, params: Sequence[ArrayLike]) -> DifferenceHessian:
    """The operator with the step, of several, at which doubling it changes a product least.

    Args:
        op: with some step.
        params: the leaves that it differentiates by.
    """
    if isinstance(op.loss, jax.core.Tracer):
        return op
    began = time.perf_counter()
    steps = [2.0**e * float(op.relative_step) for e in _EXPONENTS]
    middle = op.with_step(steps[len(steps) // 2])
    key = jax.random.key(0, impl="threefry2x32")
    start = jax.random.normal(key, (1, op.shape[0]), op.dtype)
    sharp = _power_of_two(product := compiled_product(middle, start)) * product
    # A random vector moves all parameters a little; its product, the directions of high curvature.
    errors = np.zeros(len(steps) - 1)
    for vector in (start, sharp):
        last: Any = None
        for i, step in enumerate(steps):
            product = compiled_product(op.with_step(step), vector)
            if i:
                # The squares of small or large entries leave the range of float32.
                unit = _power_of_two(last)
                change = jnp.linalg.norm(unit * product - unit * last)
                size = jnp.linalg.norm(unit * last)
                # NaN, as where a step leaves the domain of the loss, is the worst of errors.
                error = 0.0 if size == 0 else float(change / size)
                errors[i - 1] = np.maximum(errors[i - 1], error)
            last = product
    best = int(np.argmin(np.where(np.isnan(errors), np.inf, errors)))
    chosen = op.with_step(steps[best])
    _check_differences(chosen, params, start)
    theta = op.space.ravel(jax.tree.unflatten(op.space.treedef, params))[None]
    error = float(np.maximum(errors[best], _asymmetry(chosen, theta, start)))
    if not error <= _LARGE_ERROR:
        warn(
            f"finite differences: products are off by {error:.2g} of their length, as measured. A "
            "loss with kinks, or parameters of very different sizes: take method='autodiff', or "
            "parameters of like sizes by where=, or scale them"
        )
    seconds = op.seconds.plus("tuning", time.perf_counter() - began)
    return dataclasses.replace(chosen, relative_error=np.float32(error), seconds=seconds)


def _power_of_two(rows: Array) -> float:
    """What makes the largest entry about 1, exactly; 1 where there is none."""
    largest = float(jnp.max(jnp.abs(rows)))
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return 2.0 ** -min(max(exponent, -120), 120)


def _check_differences(op: DifferenceHessian, params: Sequence[ArrayLike], v: Array) -> None:
    """Refuse a loss with gradients so small that their differences are read as zero.

    Raises:
        FloatingPointError: it is one.
    """
    taken = [jnp.asarray(leaf, op.dtype) for leaf in params]
    h = float(_step(taken, jax.tree.leaves(op.space.unravel(v[0])), op.relative_step))
    limits = jnp.finfo(op.dtype)
    difference = 2 * h * float(jnp.max(jnp.abs(compiled_product(op, v))))
    if difference == 0:
        # Unless the gradient is constant, it changes where the parameters move by all their length.
        difference = float(jnp.max(jnp.abs(compiled_product(op.with_step(1.0), v))))
        small = difference > 0 or 0 < abs(float(op.loss)) < float(limits.tiny) / float(limits.eps)
    else:
        small = difference < float(limits.tiny) / float(limits.eps)
    if small:
        raise FloatingPointError(
            f"finite differences: the gradient is so small that its differences underflow in "
            f"{op.dtype}: multiply the loss by a power of two, such as 2**60, and divide the "
            "results by it, or take method='autodiff'"
        )


def _asymmetry(op: DifferenceHessian, theta: Array, v: Array) -> float:
    """`|uᵀD v − vᵀD u|` of a random u that is the same part of all parameters, relative.

    A step along u is small beside each of them; along v, beside the largest alone.
    """
    key = jax.random.key(1, impl="threefry2x32")
    u = theta * jax.random.normal(key, theta.shape, theta.dtype)
    if not bool(jnp.any(u != 0)):
        return 0.0
    # In float64 the squares of all of them are in range.
    x, y, dx, dy = (
        np.asarray(w, np.float64)[0]
        for w in (u, v, compiled_product(op, u), compiled_product(op, v))
    )
    forth, back = float(x @ dy), float(y @ dx)
    # Random vectors may have next to no inner product.
    usual = [float(np.linalg.norm(a) * np.linalg.norm(b)) for a, b in ((x, dy), (y, dx))]
    scale = max(abs(forth), abs(back), min(usual) / op.shape[0] ** 0.5)
    return abs(forth - back) / scale if scale != 0 else 0.0
