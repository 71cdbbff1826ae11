"""The methods of `trace`: what is done with a run's products."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.device import probing
from curvax.estimators import leave_one_out, spread
from curvax.estimators.arguments import FEWEST_SAMPLES, mean_stderr
from curvax.estimators.exact import exact_diagonal
from curvax.estimators.leave_one_out import LeaveOneOut
from curvax.estimators.run import SKETCH_PART, Run
from curvax.estimators.sketch import Sketch
from curvax.memory import SHARE, available_bytes
from curvax.operators.base import Blocks
from curvax.results import TraceResult
from curvax.typing import FloatArray

# Where the rows of the seed's sequence begin that are independent of every sketch.
_INDEPENDENT = 1 << 31

# From one check of the standard error to the next, a sketch grows by this factor.
_GROWTH = 1.25


def exact(run: Run) -> TraceResult:
    """The sum of the diagonal's entries, from n unit vectors; NaN after Ctrl-C."""

    def note(count: int, total: float) -> None:
        run.matvecs = count
        run.note(total, 0.0 if count == run.op.shape[0] else math.inf)

    rows = run.settings.block
    entries, size = exact_diagonal(run.op, rows, run.clock, run.interrupted, note)
    stderr = math.inf if run.interrupted else 0.0
    return run.result("exact", float(np.sum(entries, dtype=np.float64)), stderr, (), size)


def hutchinson(run: Run) -> TraceResult:
    """The mean of `zᵀA z` over probes with the covariance I (Hutchinson 1989)."""
    samples, stderr, size = _sample(run, run.known.vectors, 0, run.dimension, 0.0)
    run.warn_if_above(stderr)
    return run.result("hutchinson", float(np.mean(samples)), stderr, samples, size)


def _sample(
    run: Run, off: Array | None, first: int, dimension: int, known: float
) -> tuple[list[float], float, float]:
    """Samples of `zᵀA z` until the budget or the standard error asked for is reached.

    Args:
        run: makes the products and counts them.
        off: orthonormal rows that the probes are projected off, or None.
        first: the first row of the seed's sequence.
        dimension: of the space that is left.
        known: added to the estimates that are reported.

    Returns:
        The samples, the standard error of their mean, and the operator's Frobenius norm on the
        space that is left, estimated.
    """
    distribution = run.settings.distribution
    signs = distribution == "rademacher"
    samples: list[float] = []
    squares, left, scatter = 0.0, 0.0, 0.0
    mean = jnp.zeros((1, run.op.shape[0]), run.op.dtype) if signs else None
    while True:
        seen, count = len(samples), min(run.settings.block, run.left)
        block = run.probes(first + seen, count, off)
        products = run.multiply(block)
        zw, zz, ww = run.forms(block, products)
        squares += float(np.sum(ww))
        if off is not None:
            # The variance is that of what is left on both sides, as a form of the whole probes.
            products = probing.project_off(run.clock, off, products)
            block = run.probes(first + seen, count, None) if signs else block
            zw, _, ww = run.forms(block, products)
        # Uniform on the sphere of the space that is left, of the radius that its dimension gives.
        scale: Any = (
            dimension / np.maximum(zz, np.finfo(np.float64).tiny) if distribution == "sphere" else 1
        )
        samples += list(zw * scale)
        left += float(np.sum(ww * scale))
        if mean is not None:
            mean, growth = probing.scatter(run.clock, mean, block, products, np.float64(seen))
            scatter += float(np.asarray(growth))
        stderr = math.inf
        if len(samples) > 1:
            rows = spread.row_variance(scatter, left, len(samples), distribution)
            variance = spread.of_whole(rows, np.asarray(samples), dimension, distribution)
            stderr = math.sqrt(variance / len(samples))
        run.note(known + float(np.mean(samples)), stderr)
        if run.interrupted or run.left == 0 or run.reached(len(samples), stderr):
            return samples, stderr, math.sqrt(squares / len(samples))


def hutchinson_of_blocks(run: Run, blocks: Blocks) -> dict[str, TraceResult]:
    """Hutchinson's estimates of all diagonal blocks from the probes of the whole operator."""
    # What the program reads of them: the operator would be an argument once for each block.
    cuts: Any = tuple(dataclasses.replace(cut, inner=None) for cut in blocks.values())  # type: ignore[arg-type]
    sizes = [cut.shape[0] for cut in blocks.values()]
    signs = run.settings.distribution == "rademacher"
    means: Any = tuple(jnp.zeros((1, size), run.op.dtype) for size in sizes) if signs else ()
    rows: list[FloatArray] = []
    squares, scatter = np.zeros((2, len(cuts)))
    while True:
        seen, count = len(rows), min(run.settings.block, run.left)
        block = run.probes(seen, count, None)
        products = run.multiply(block)
        run.forms(block, products)
        zw, ww = (np.asarray(x) for x in probing.forms_by_block(run.clock, cuts, block, products))
        rows += list(zw)
        squares += ww.sum(axis=0)
        if signs:
            means, growth = probing.scatter_by_block(
                run.clock, cuts, means, block, products, np.float64(seen)
            )
            scatter += np.asarray(growth)
        samples = np.transpose(rows)
        parts = zip(scatter, squares, samples, sizes, strict=True)
        stderrs = [_stderr_of_block(run, *part) for part in parts]
        total = (float(np.sum(scatter)), float(np.sum(squares)), samples.sum(axis=0), sum(sizes))
        run.note(float(np.mean(total[2])), _stderr_of_block(run, *total))
        if run.interrupted or run.left == 0 or run.reached(len(rows), max(stderrs)):
            break
    run.warn_if_above(max(stderrs))
    results = {}
    for name, own, stderr, square in zip(blocks, samples, stderrs, squares, strict=True):
        size = math.sqrt(square / len(rows))
        # A block far smaller than the others is not scaled: what was read as zero is below this.
        floor = blocks[name].shape[0] * float(np.finfo(run.op.dtype).tiny)
        mean = float(own.mean())
        results[name] = run.result("hutchinson", mean, stderr, list(own), size, floor)
    return results


def _stderr_of_block(
    run: Run, scatter: float, squares: float, samples: FloatArray, size: int
) -> float:
    """Of the mean of a block's samples; of the whole operator if that is its size."""
    if len(samples) < 2:
        return math.inf
    distribution, n = run.settings.distribution, run.op.shape[0]
    rows = spread.row_variance(scatter, squares, len(samples), distribution)
    variance = spread.of_whole if size == n else spread.of_block
    return math.sqrt(variance(rows, samples, n, distribution) / len(samples))


def exchangeable(run: Run, method: str) -> TraceResult:
    """XTrace or XNysTrace: the mean of the leave-one-out estimates of a sketch."""
    sketch = _sketch(run, method)
    for _ in _grow(run, sketch, run.settings.limit // SKETCH_PART[method]):
        estimates = sketch.estimates()
        mean, stderr = float(estimates.single.mean()), leave_one_out.stderr(estimates)
        run.note(mean, stderr)
        if run.reached(sketch.size, stderr):
            break
    run.warn_if_above(stderr)
    return _of_sketch(run, sketch, method, estimates)


def _of_sketch(run: Run, sketch: Sketch, method: str, estimates: LeaveOneOut) -> TraceResult:
    single, stderr = estimates.single, leave_one_out.stderr(estimates)
    size, noise = sketch.frobenius, estimates.noise
    return run.result(method, float(single.mean()), stderr, list(single), size, noise)


def hutch_plus_plus(run: Run) -> TraceResult:
    """Hutch++ (Meyer, Musco, Musco and Woodruff 2021, algorithm 1).

    A third of the products makes a sketch, a third multiplies its basis, the rest are samples of
    what the basis leaves. With `until`, the sketch grows while that lowers the total that it and
    the samples then needed will take, by the variance that its leave-one-out estimates show (the
    idea of A-Hutch++: Persson, Cortinovis and Kressner, "Improved variants of the Hutch++
    algorithm", SIAM J. Matrix Anal. Appl. 43 (2022)). The samples are independent of all that.
    """
    sketch, until = _sketch(run, "hutch++"), run.settings.until
    fewest = math.inf
    for _ in _grow(run, sketch, min(run.settings.limit // 3, max(1, run.dimension - 1))):
        if until is None and not run.interrupted:
            continue
        estimates = sketch.estimates()
        mean, stderr = float(estimates.single.mean()), leave_one_out.stderr(estimates)
        run.note(mean, stderr)
        if until is None or run.interrupted:
            # There are no samples of the rest, but these products are those of XTrace.
            return _of_sketch(run, sketch, "xtrace", estimates)
        needed = run.matvecs + float(np.var(estimates.single, ddof=1)) / until**2
        if needed >= fewest:
            break
        fewest = needed
    known, dimension = float(np.trace(sketch.projected)), run.dimension - sketch.size
    samples, stderr, _ = _sample(run, sketch.basis, _INDEPENDENT, dimension, known)
    run.warn_if_above(stderr)
    total = known + float(np.mean(samples))
    return run.result("hutch++", total, stderr, samples, sketch.frobenius)


def _sketch(run: Run, method: str) -> Sketch:
    """An empty sketch, with room for what the products asked for will fill."""
    capacity = min(run.settings.planned // SKETCH_PART[method], run.dimension)
    return Sketch(run, max(1, capacity), project=method != "xnystrace")


def _grow(run: Run, sketch: Sketch, size: int) -> Iterator[None]:
    """Grow a sketch up to a size, and yield wherever its estimates are wanted.

    That is at the end, on Ctrl-C, and on the way where a standard error is asked for. After the
    blocks between, the estimate reported is the plain mean over the probes of the sketch.
    """
    size = min(size, run.dimension, max(sketch.capacity, _most_vectors(run)))
    # Whole blocks: for another number of vectors the operator's product is compiled again.
    block = run.settings.block
    check = size if run.settings.until is None else min(size, block * -(-FEWEST_SAMPLES // block))
    while sketch.size < size and not (run.interrupted and sketch.size):
        count = min(block, size - sketch.size)
        if sketch.size + count > sketch.capacity:
            sketch.reserve(min(size, 2 * sketch.capacity + count))
        sketch.extend(count)
        if sketch.size < check and not run.interrupted:
            run.note(*mean_stderr(sketch.hutchinson))
        # The callback, too, may be where the interrupt comes.
        if sketch.size >= check or run.interrupted:
            yield
            check = min(size, math.ceil(_GROWTH * sketch.size))


def _most_vectors(run: Run) -> int:
    """Vectors that a sketch may grow to: while it is copied, half as many are held beside them."""
    free = SHARE * available_bytes() / (1.5 * run.op.shape[0] * run.op.dtype.itemsize)
    return int(free) - run.known.count
