"""`diagonal`: the diagonal of a symmetric operator, or of its blocks, with standard errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import reject_tracers
from curvax.checks import check_callback, check_choice, check_count, check_seed, seed_word
from curvax.device import probes, probing
from curvax.estimators import arguments, leave_one_out
from curvax.estimators.arguments import (
    FEWEST_FOR_INTERVAL,
    FEWEST_SAMPLES,
    mean_stderr,
    too_few_samples,
)
from curvax.estimators.exact import chunk_size, exact_diagonal
from curvax.estimators.sampling import Sampling, Settings
from curvax.estimators.sketch import Sketch
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import in_range, scaled_callback
from curvax.memory import check_fits
from curvax.operators.base import Blocks, Operator, RestrictedOperator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.operators.evidence import check_form
from curvax.options import takes_options
from curvax.program import Clock, host
from curvax.results import BlockResults, DiagonalResult, TraceProgress

METHODS = ("auto", "hutchinson", "xdiag", "exact")

# The fewest products that give a standard error. XDiag makes two for each sample, and of a few
# samples its error bars are too short.
_FEWEST = {"hutchinson": 2, "xdiag": 2 * FEWEST_SAMPLES, "exact": 1}


class DiagonalOptions(TypedDict, total=False):
    """Options of `diagonal`, which says what they mean, with their defaults."""

    method: Annotated[Literal["auto", "hutchinson", "xdiag", "exact"], "auto"]
    num_matvecs: Annotated[int, 100]
    distribution: Annotated[Literal["rademacher", "gaussian", "sphere"], "rademacher"]
    seed: Annotated[int | None, None]
    block_size: Annotated[int | Literal["auto"], "auto"]
    callback: Annotated[Callable[[TraceProgress], object] | None, None]


@overload
def diagonal(A: Blocks, **options: Unpack[DiagonalOptions]) -> BlockResults[DiagonalResult]: ...


@overload
def diagonal(A: OperatorLike, **options: Unpack[DiagonalOptions]) -> DiagonalResult: ...


@takes_options(DiagonalOptions)
def diagonal(
    A: OperatorLike | Blocks, **options: Unpack[DiagonalOptions]
) -> DiagonalResult | BlockResults[DiagonalResult]:
    """Find or estimate the diagonal of a symmetric operator.

    Args:
        A: a curvax operator, a dense or SciPy sparse symmetric array, anything with `shape`,
            `dtype` and `matvec`; or the blocks of an operator, `op.blocks(...)`, which one run on
            the whole operator serves.
        method: `"hutchinson"` (Bekas, Kokiopoulou and Saad) fits `A z ≈ d ∘ z` to the probes z; it
            holds three vectors, and two for each of a block. `"xdiag"` (Epperly, Tropp and Webber,
            section 2.4) first captures the large eigenvalues; it holds as many vectors as products.
            `"exact"` multiplies all n unit vectors, as many at a time as memory allows. `"auto"` is
            `"exact"` where `num_matvecs` is n or more, as is `"xdiag"` then, else `"hutchinson"`.
        num_matvecs: how many vectors to multiply; not used by `"exact"`.
        distribution: of the probes: `"rademacher"` (±1), `"gaussian"` or `"sphere"` (uniform on the
            sphere of radius √n); `"xdiag"` takes the first alone.
        seed: seed of all random numbers; the same seed gives the same estimate, to rounding
            whatever `block_size` is. Drawn if None, and recorded in the result.
        block_size: vectors per product, up to 32. By default 1 on a CPU, else 4; for `"exact"` up
            to 64, by size and memory.
        callback: called with a `TraceProgress` after each block of products. Its estimate is that
            of the trace; for `"exact"`, the sum of the entries known.

    Returns:
        The diagonal and its standard errors, in the structure of `params`, or by the block's name.
        The standard errors of `"hutchinson"` and `"xdiag"` allow for one rounding of each product;
        of 2 to 7 samples they are NaN, and `no_stderr` says why.
        After Ctrl-C: the estimate from the probes so far, or, for `"exact"`, NaN in the entries
        that were not reached.

    Raises:
        TypeError: an argument of a wrong type, or a call inside a transformation such as `jit`.
        ValueError: an argument out of range, or (`"xdiag"`) an operator measured not to be
            symmetric.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: the vectors of `"xdiag"` do not fit in the free memory, or
            memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.

    References:
        C. Bekas, E. Kokiopoulou and Y. Saad, "An estimator for the diagonal of a matrix", Appl.
        Numer. Math. 57 (2007). E. Epperly, J. Tropp and R. Webber, "XTrace: making the most of
        every sample in stochastic trace estimation", SIAM J. Matrix Anal. Appl. 45 (2024).
    """
    whole = A.whole if isinstance(A, Blocks) else A
    reject_tracers("diagonal", whole)
    op = as_operator(whole)
    clock = Clock("products", "host")
    method, settings = _settle(op, options, clock)
    smaller = [] if method == "hutchinson" else ["use method='hutchinson', which keeps no vectors"]
    explained = Explained(op, smaller, settings.block)
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):

        def attempt(scaled: Operator) -> DiagonalResult | BlockResults[DiagonalResult]:
            callback = scaled_callback(scaled, settings.callback)
            own = dataclasses.replace(settings, callback=callback)
            sampling = Sampling(scaled, own, interrupted, clock)
            found = {"hutchinson": _hutchinson, "xdiag": _xdiag, "exact": _exact}[method](sampling)
            return _deliver(A if isinstance(A, Blocks) else op, sampling, method, *found)

        return in_range(op, attempt)


def _settle(op: Operator, options: DiagonalOptions, clock: Clock) -> tuple[str, Settings]:
    """Check the arguments of `diagonal`, and decide what is left open."""
    n = op.shape[0]
    method = check_choice("method", options["method"], METHODS)
    distribution = check_choice("distribution", options["distribution"], probes.DISTRIBUTIONS)
    count = check_count("num_matvecs", options["num_matvecs"], low=1)
    if count >= n and method in ("auto", "xdiag"):
        method = "exact"
    elif method == "auto":
        method = "hutchinson"
    check_count("num_matvecs", count, _FEWEST[method], f", with method={method!r}")
    if method == "xdiag" and distribution != "rademacher":
        raise ValueError(
            "method='xdiag' divides by the squares of the probes: distribution must be "
            f"'rademacher', got {distribution!r}"
        )
    block = arguments.check_block(options["block_size"], n)
    if method == "exact":
        count = n
        block = chunk_size(op, clock) if options["block_size"] == "auto" else block
    settings = Settings(
        planned=count,
        limit=count,
        distribution=distribution,
        until=None,
        seed=check_seed(options["seed"]),
        block=block,
        callback=check_callback(options["callback"]),
    )
    return method, settings


def _exact(sampling: Sampling) -> tuple[Array, Array, int]:
    """The diagonal, zeros (NaN where it was not reached), and the number of samples."""
    found, _ = exact_diagonal(sampling)
    entries = jnp.asarray(found)
    return (
        entries,
        jnp.where(jnp.isnan(entries), jnp.nan, jnp.zeros_like(entries)),
        sampling.matvecs,
    )


def _hutchinson(sampling: Sampling) -> tuple[Array, Array, int]:
    """The least-squares fit of `A z ≈ d ∘ z`, entry by entry, which for ±1 is a mean of `z ∘ A z`.

    Given the other entries of z, what is left of entry i is independent of `z_i`, so that a linear
    regression's standard error is right (exactly so for Gaussian probes).
    """
    state = jnp.zeros((3, sampling.op.shape[0]), sampling.op.dtype)
    traces: list[float] = []
    while sampling.left > 0 and not (sampling.interrupted and traces):
        block = sampling.probes(len(traces), min(sampling.settings.block, sampling.left), None)
        products = sampling.multiply(block)
        zw, _, _ = sampling.forms(block, products)
        state = probing.regress(sampling.clock, state, block, products)
        traces += list(zw)
        sampling.note(*mean_stderr(traces))
    stderr = probing.regression_stderr(
        sampling.clock, state, host(np.float64(len(traces))), host(np.float64(sampling.eps))
    )
    return state[0], stderr, len(traces)


def _xdiag(sampling: Sampling) -> tuple[Array, Array, int]:
    """The mean of the leave-one-out estimates of a sketch."""
    op, size = sampling.op, min(sampling.settings.limit // 2, sampling.dimension)
    check_fits(
        (2 * size + 3 * sampling.settings.block) * op.shape[0] * op.dtype.itemsize,
        op,
        f"method='xdiag' with num_matvecs={sampling.settings.limit} needs",
        "lower num_matvecs, or use method='hutchinson'",
    )
    kept = jnp.zeros((size, op.shape[0]), op.dtype)

    def keep(products: Array) -> None:
        nonlocal kept
        first = np.int32(sketch.size - len(products))
        kept = probing.store(sampling.clock, kept, products, host(first))

    sketch = Sketch(sampling, size, project=True, keep=keep)
    while sketch.size < size and not (sampling.interrupted and sketch.size):
        sketch.extend(min(sampling.settings.block, size - sketch.size))
        sampling.note(*mean_stderr(sketch.hutchinson))
    basis, k = sketch.basis, sketch.size
    if k < size:
        basis, kept = basis[:k], kept[:k]
    check_form(np.asarray(probing.inner(sampling.clock, basis, kept)), sketch.frobenius)
    taken = leave_one_out.directions(sketch.factor)
    small = (
        host(taken.vectors),
        host(np.sum(taken.vectors * sketch.factor, axis=0)),
        host(taken.cosines),
        host(taken.inverse_sines2),
    )
    estimate, stderr = probing.leave_one_out_diagonal(
        sampling.clock, basis, kept, host(seed_word(sampling.seed)), small
    )
    return estimate, stderr, k


def _deliver(
    A: Operator | Blocks,
    sampling: Sampling,
    method: str,
    estimate: Array,
    stderr: Array,
    samples: int,
) -> DiagonalResult | BlockResults[DiagonalResult]:
    reason = ""
    if method != "exact" and samples < FEWEST_FOR_INTERVAL:
        reason = too_few_samples(samples, {"hutchinson": 1, "xdiag": 2}[method])
        if samples > 1:
            stderr = jnp.full_like(stderr, jnp.nan)

    def result(op: Operator, vectors: tuple[Array, Array]) -> DiagonalResult:
        return DiagonalResult(
            estimate=op.unravel(vectors[0]),
            stderr=op.unravel(vectors[1]),
            num_samples=samples,
            method=method,
            num_matvecs=sampling.matvecs,
            block_size=sampling.settings.block,
            seed=None if method == "exact" else sampling.settings.seed,
            seconds=sampling.clock.parts(),
            interrupted=bool(sampling.interrupted),
            no_stderr=reason,
        )

    if isinstance(A, Operator):
        return result(A, (estimate, stderr))

    def of_block(op: RestrictedOperator) -> DiagonalResult:
        return result(op, (op.extract(estimate[None])[0], op.extract(stderr[None])[0]))

    sizes = {name: op.shape[0] for name, op in A.items()}
    return BlockResults({name: of_block(op) for name, op in A.items()}, sizes)
