"""Power iteration: the plain method, for those who ask for it.

With the unit vector v and the operator A, one step is one product w = A v:

    λ = <v, w>    r = ‖w − λ v‖    v⁺ = P(w − β v⁻) / ‖·‖,  and v by the same number

where v⁻ is the vector before, P projects off the pairs found earlier, and β is the momentum (De Sa
et al. 2017, "Accelerated stochastic power iteration", Algorithm 1: best at λ₂²/4). λ is the
Rayleigh quotient, without the momentum. `eigsh` needs far fewer products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import reject_tracers, scale_of
from curvax.checks import (
    check_callback,
    check_count,
    check_integer,
    check_number,
    check_seed,
    seed_word,
)
from curvax.device import programs
from curvax.device.programs import solve_clock
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import InRange, check_range, exponent_of, in_range, scaled_callback
from curvax.operators.algebra import project
from curvax.operators.base import Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.operators.curvature import Curvature
from curvax.operators.evidence import check_symmetry, report_nonfinite
from curvax.options import takes_options
from curvax.program import host, program
from curvax.results import EigenResult, Progress
from curvax.warnings import warn_unconverged


@takes_options()
def power_iteration(
    A: OperatorLike,
    k: int = 1,
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    momentum: float = 0.0,
    resample: bool = False,
    seed: int | None = None,
    callback: Callable[[Progress], object] | None = None,
) -> EigenResult:
    """Find the k eigenvalues of largest magnitude by power iteration with deflation.

    For comparison with the literature: `eigsh` needs a small part of the products, and sees
    eigenvalues of equal magnitude and opposite sign, between which power iteration never settles.

    Args:
        A: see `eigsh`.
        k: how many pairs, from 1 to n.
        tol: allowed residual, relative to the largest magnitude found.
        max_matvecs: the most products, over all pairs; by default 1000 k. With `resample`, as many
            are made: k times the same number.
        momentum: β, in units of eigenvalues squared.
        resample: multiply by a fresh microbatch of the operator's in each step, drawn at random.
            That is no linear operator, so that nothing is certified: `residuals` are NaN, no pair
            counts as converged, and the values are means over the second half of the steps.
        seed: see `eigsh`.
        callback: called with a `Progress` after each product.

    Returns:
        The pairs. Residuals are those of A itself, not of the deflated operator.

    Raises:
        TypeError: an argument of a wrong type, or `resample` without a curvature of a loss.
        ValueError: an argument out of range, `resample` of an operator with one microbatch, or an
            operator measured not to be symmetric.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.
    """
    reject_tracers("power_iteration", A)
    op = as_operator(A)
    k = check_count("k", k, low=1)
    if k > op.shape[0]:
        raise ValueError(f"k must be at most n = {op.shape[0]}, got {k}")
    limit = check_integer("max_matvecs", max_matvecs, low=2 * k) or 1000 * k
    if resample:
        _check_resampled(op)
    tol, momentum = check_number("tol", tol), check_number("momentum", momentum)
    seed = check_seed(seed)
    explained = Explained(op, ["lower k"] if k > 1 else [])
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):
        check_callback(callback)

        def attempt(scaled: Operator) -> EigenResult:
            squared = float(np.ldexp(momentum, 2 * exponent_of(scaled)))
            own = scaled_callback(scaled, callback)
            run = _Power(scaled, k, tol, limit, squared, resample, seed, own)
            return run.run(interrupted)

        return in_range(op, attempt)


def _check_resampled(op: Operator) -> None:
    if not isinstance(op, Curvature):
        raise TypeError(
            "resample needs an operator with microbatches, as of hessian, ggn or fisher, got "
            f"{type(op).__name__}"
        )
    if op.num_microbatches < 2:
        raise ValueError(
            "resample needs several microbatches to draw from, got 1: pass a list of batches, or "
            "microbatch_size"
        )


class _Power:
    def __init__(
        self,
        op: Operator,
        k: int,
        tol: float,
        limit: int,
        momentum: float,
        resample: bool,
        seed: int,
        callback: Callable[[Progress], object] | None,
    ) -> None:
        self.op, self.k, self.limit, self.seed = op, k, limit, seed
        self.tol = max(tol, 4 * float(jnp.finfo(op.dtype).eps))
        self.momentum, self.resample, self.callback = momentum, resample, callback
        self.clock = solve_clock()
        self.rng = np.random.default_rng(seed)
        # Those in which no label counts have no mean to differentiate.
        whole = op.inner if isinstance(op, InRange) else op
        weights = whole.microbatch_weights if isinstance(whole, Curvature) else np.zeros(0)
        self.counted = np.flatnonzero(weights)
        self.found = jnp.zeros((k, op.shape[0]), op.dtype)
        self.values: list[float] = []
        self.residuals: list[float] = []
        self.history: list[Progress] = []
        self.matvecs = 0
        self.longest = 0.0

    def run(self, interrupted: InterruptFlag) -> EigenResult:
        for i in range(self.k):
            share = (self.limit - self.matvecs) // (self.k - i)
            self._pair(i, share, interrupted)
            if interrupted:
                break
        return self._report(bool(interrupted))

    def _pair(self, i: int, share: int, interrupted: InterruptFlag) -> None:
        like, number = jnp.zeros(1, jnp.int32), np.uint32(i + 1)
        start = programs.random_block(
            self.clock, self.op, like, host(seed_word(self.seed)), host(number)
        )
        v, before = start_pair(self.clock, self.found, start)
        quotients = []
        expected: tuple[float, float] | None = None
        for made in range(share):
            product = self._multiply(v)
            following, scaled, small = step(
                self.clock, self.found, v, before, product, host(np.float64(self.momentum))
            )
            quotient, residual, *inner = (float(x) for x in small)
            self._check(product, quotient)
            self.longest = max(self.longest, math.hypot(quotient, residual))
            check_range(self.op, self.longest)
            if not self.resample:
                expected = self._check_symmetric(expected, *inner)
            quotients.append(quotient)
            scale = max([abs(quotient), *map(abs, self.values)])
            self._note(i, residual / scale if scale > 0 else 0.0, scale)
            done = not self.resample and residual <= self.tol * scale
            if done or interrupted or made + 1 == share:
                break
            v, before = following, scaled
        if self.resample:
            quotient, residual = float(np.mean(quotients[len(quotients) // 2 :])), float("nan")
        self.values.append(quotient)
        self.residuals.append(residual)
        self.found = keep(self.clock, self.found, v, host(np.int32(i)))

    def _multiply(self, v: Array) -> Array:
        op = self.op
        if self.resample:
            whole = op.inner if isinstance(op, InRange) else op
            assert isinstance(whole, Curvature)
            one = whole.microbatch(int(self.rng.choice(self.counted)))
            op = dataclasses.replace(op, inner=one) if isinstance(op, InRange) else one
        with self.clock.part("products"):
            self.matvecs += 1
            return jax.block_until_ready(programs.multiply(self.clock, op, jnp.copy(v)))

    def _check(self, product: Array, quotient: float) -> None:
        if np.isfinite(quotient):
            return
        if not bool(jnp.isfinite(product).all()):
            report_nonfinite(self.op, product, self.matvecs)
        raise FloatingPointError(
            f"the iteration overflowed at product {self.matvecs}: lower momentum"
        )

    def _check_symmetric(
        self, expected: tuple[float, float] | None, back: float, forth: float, norm: float
    ) -> tuple[float, float]:
        """Compare what `step` returned with what it returned before; what to expect next."""
        if expected is not None:
            forward, scale = expected
            sizes = map(abs, (forward, back * scale, *self.values))
            check_symmetry(abs(back * scale - forward), max(sizes))
        return forth, norm

    def _note(self, done: int, residual: float, largest: float) -> None:
        progress = Progress(
            matvecs=self.matvecs,
            converged=done,
            k=self.k,
            residual=residual,
            tol=self.tol,
            max_matvecs=self.limit,
            restarts=0,
            largest=largest,
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.callback is not None:
            self.callback(progress)

    def _report(self, interrupted: bool) -> EigenResult:
        values, residuals = np.asarray(self.values), np.asarray(self.residuals)
        scale = np.abs(values).max()
        converged = residuals <= self.tol * scale
        if not (self.resample or interrupted or converged.all()):
            remedy = f"raise max_matvecs ({self.limit}), or use eigsh"
            warn_unconverged(int(converged.sum()), len(values), self.matvecs, remedy)
        vectors = self.found[: len(values)]
        wide = np.asarray(programs.gram(self.clock, vectors, host(np.zeros(len(values), np.int32))))
        return EigenResult.measured(
            values,
            residuals,
            lambda down: self.op.unravel(vectors[down]),
            estimated_errors=residuals,  # nothing is known of further eigenvalues
            converged=converged,
            complete=None,
            orthogonality=float(np.abs(wide - np.eye(len(values))).max()),
            noise=0.0,
            tol_effective=np.full(len(values), self.tol),
            num_matvecs=self.matvecs,
            num_verification=0,
            num_restarts=0,
            block_size=1,
            seed=self.seed,
            history=self.history,
            clock=self.clock,
            interrupted=interrupted,
            certified=not self.resample,
        )


def _norm(x: Array) -> Array:
    safe = scale_of(x)
    return safe * jnp.sqrt(jnp.sum((x / safe).astype(jnp.float64) ** 2)).astype(x.dtype)


@program(donate=(1,), wide=True)
def start_pair(found: Array, block: Array) -> tuple[Array, Array]:
    """A unit vector orthogonal to the rows found, from a random one, and zero for that before."""
    v = project(found, project(found, block))
    return v / _norm(v), jnp.zeros_like(v)


@program(wide=True)
def step(
    found: Array, v: Array, before: Array, product: Array, momentum: Array
) -> tuple[Array, Array, Array]:
    """A step.

    Returns:
        The next vector v⁺; the present one scaled alike, by 1/s; and `λ, ‖A v − λ v‖, <A v, v⁻>,
        <A v, v⁺>, s` in float64, of which the third of a step, times s of the step before, is the
        fourth of that if A is symmetric.
    """
    x, w = v.astype(jnp.float64), product.astype(jnp.float64)
    square = jnp.sum(x * x)
    quotient = jnp.sum(x * w) / square
    difference = product - quotient.astype(v.dtype) * v
    residual = _norm(difference).astype(jnp.float64) / jnp.sqrt(square)
    following = project(found, product - momentum.astype(v.dtype) * before)
    following = project(found, following)
    norm = _norm(following)
    # A product of zero: the operator has nothing left, and v is an eigenvector of eigenvalue 0.
    norm = jnp.where(norm > 0, norm, 1)
    following = jnp.where(jnp.any(following != 0), following / norm, v)
    back, forth = (jnp.sum(u.astype(jnp.float64) * w) for u in (before, following))
    small = jnp.stack([quotient, residual, back, forth, norm.astype(jnp.float64)])
    return following, v / norm, small


@program(donate=(0,))
def keep(found: Array, v: Array, i: Array) -> Array:
    """The rows found, with row i replaced."""
    return jax.lax.dynamic_update_slice_in_dim(found, v.astype(found.dtype), i, axis=0)
