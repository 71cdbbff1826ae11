"""`diagonal`: the diagonal of a symmetric operator, or of its blocks, with standard errors."""

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import reject_tracers
from curvax.checks import check_callback, check_choice, check_count, check_seed
from curvax.device import probes, probing
from curvax.estimators import arguments, leave_one_out
from curvax.estimators.arguments import (
    FEWEST_FOR_INTERVAL,
    FEWEST_SAMPLES,
    mean_stderr,
    too_few_samples,
)
from curvax.estimators.exact import chunk_size, exact_diagonal
from curvax.estimators.run import Known, Run, Settings
from curvax.estimators.sketch import Sketch
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import in_range, scaled_callback
from curvax.memory import available_bytes, readable
from curvax.operators.base import Blocks, Operator, RestrictedOperator
from curvax.operators.conversion import as_operator, original_errors
from curvax.operators.evidence import check_form
from curvax.program import Clock
from curvax.results import BlockResults, DiagonalResult, TraceProgress

METHODS = ("auto", "hutchinson", "xdiag", "exact")

# The fewest products that give a standard error. XDiag makes two for each sample, and of a few
# samples its error bars are too short.
_FEWEST = {"hutchinson": 2, "xdiag": 2 * FEWEST_SAMPLES, "exact": 1}


@overload
def diagonal(A: Blocks, **options: Any) -> BlockResults[DiagonalResult]: ...


@overload
def diagonal(
    A: Any,
    *,
    method: Literal["auto", "hutchinson", "xdiag", "exact"] = "auto",
    num_matvecs: int = 100,
    distribution: Literal["rademacher", "gaussian", "sphere"] = "rademacher",
    seed: int | None = None,
    block_size: int | Literal["auto"] = "auto",
    callback: Callable[[TraceProgress], Any] | None = None,
) -> DiagonalResult: ...


# The first overload stands for the same keywords.
def diagonal(  # type: ignore[misc]
    A: Any,
    *,
    method: Literal["auto", "hutchinson", "xdiag", "exact"] = "auto",
    num_matvecs: int = 100,
    distribution: Literal["rademacher", "gaussian", "sphere"] = "rademacher",
    seed: int | None = None,
    block_size: int | Literal["auto"] = "auto",
    callback: Callable[[TraceProgress], Any] | None = None,
) -> Any:
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
    n = op.shape[0]
    check_choice("method", method, METHODS)
    check_choice("distribution", distribution, probes.DISTRIBUTIONS)
    count = check_count("num_matvecs", num_matvecs, low=1)
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
    drawn, block = check_seed(seed), arguments.check_block(block_size, n)
    check_callback(callback)
    clock = Clock("products", "host")
    if method == "exact":
        count = n
        block = chunk_size(op, clock) if block_size == "auto" else block
    smaller = [] if method == "hutchinson" else ["use method='hutchinson', which keeps no vectors"]
    explained = Explained(op, smaller, block)
    with InterruptFlag() as interrupted, explained, original_errors(op):

        def attempt(scaled: Operator) -> DiagonalResult | BlockResults[DiagonalResult]:
            own = scaled_callback(scaled, callback)
            settings = Settings(count, count, distribution, None, drawn, block, own)
            run = Run(scaled, settings, interrupted, clock, Known())
            found = {"hutchinson": _hutchinson, "xdiag": _xdiag, "exact": _exact}[method](run)
            return _deliver(A if isinstance(A, Blocks) else op, run, method, *found)

        return in_range(op, attempt)


def _exact(run: Run) -> tuple[Array, Array, int]:
    """The diagonal, zeros (NaN where it was not reached), and the number of samples."""

    def note(count: int, total: float) -> None:
        run.matvecs = count
        run.note(total, 0.0 if count == run.op.shape[0] else math.inf)

    rows = run.settings.block
    found, _ = exact_diagonal(run.op, rows, run.clock, run.interrupted, note)
    entries = jnp.asarray(found)
    return entries, jnp.where(jnp.isnan(entries), jnp.nan, jnp.zeros_like(entries)), run.matvecs


def _hutchinson(run: Run) -> tuple[Array, Array, int]:
    """The least-squares fit of `A z ≈ d ∘ z`, entry by entry, which for ±1 is a mean of `z ∘ A z`.

    Given the other entries of z, what is left of entry i is independent of `z_i`, so that a linear
    regression's standard error is right (exactly so for Gaussian probes).
    """
    state = jnp.zeros((3, run.op.shape[0]), run.op.dtype)
    traces: list[float] = []
    while run.left > 0 and not (run.interrupted and traces):
        block = run.probes(len(traces), min(run.settings.block, run.left), None)
        products = run.multiply(block)
        zw, _, _ = run.forms(block, products)
        state = probing.regress(run.clock, state, block, products)
        traces += list(zw)
        run.note(*mean_stderr(traces))
    stderr = probing.regression_stderr(
        run.clock, state, np.float64(len(traces)), np.float64(run.eps)
    )
    return state[0], stderr, len(traces)


def _xdiag(run: Run) -> tuple[Array, Array, int]:
    """The mean of the leave-one-out estimates of a sketch."""
    op, size = run.op, min(run.settings.limit // 2, run.dimension)
    need = (2 * size + 3 * run.settings.block) * op.shape[0] * op.dtype.itemsize
    if need > available_bytes():
        raise MemoryError(
            f"method='xdiag' with num_matvecs={run.settings.limit} needs {readable(need)}, but "
            f"{readable(available_bytes())} are free: lower num_matvecs, or use "
            "method='hutchinson'"
        )
    kept = jnp.zeros((size, op.shape[0]), op.dtype)

    def keep(products: Array) -> None:
        nonlocal kept
        first = np.int32(sketch.size - len(products))
        kept = probing.store(run.clock, kept, products, first)

    sketch = Sketch(run, size, project=True, keep=keep)
    while sketch.size < size and not (run.interrupted and sketch.size):
        sketch.extend(min(run.settings.block, size - sketch.size))
        run.note(*mean_stderr(sketch.hutchinson))
    basis, k = sketch.basis, sketch.size
    if k < size:
        basis, kept = basis[:k], kept[:k]
    check_form(np.asarray(probing.inner(run.clock, basis, kept)), sketch.frobenius)
    taken = leave_one_out.directions(sketch.factor)
    small = (
        taken.vectors,
        np.sum(taken.vectors * sketch.factor, axis=0),
        taken.cosines,
        taken.inverse_sines2,
    )
    estimate, stderr = probing.leave_one_out_diagonal(
        run.clock, basis, kept, probes.word(run.settings.seed), small
    )
    return estimate, stderr, k


def _deliver(
    A: Operator | Blocks, run: Run, method: str, estimate: Array, stderr: Array, samples: int
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
            num_matvecs=run.matvecs,
            block_size=run.settings.block,
            seed=None if method == "exact" else run.settings.seed,
            seconds={**run.clock.seconds, "total": run.clock.total()},
            interrupted=bool(run.interrupted),
            no_stderr=reason,
        )

    if isinstance(A, Operator):
        return result(A, (estimate, stderr))

    def of_block(op: RestrictedOperator) -> DiagonalResult:
        return result(op, (op.extract(estimate[None])[0], op.extract(stderr[None])[0]))

    sizes = {name: op.shape[0] for name, op in A.items()}
    return BlockResults({name: of_block(op) for name, op in A.items()}, sizes)
