"""The methods of `trace`: what is done with the products."""

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
from curvax.estimators.sampling import Estimate, Sampling
from curvax.estimators.sketch import Sketch
from curvax.memory import SHARE, available_bytes
from curvax.operators.base import Blocks
from curvax.program import host
from curvax.typing import FloatArray

# Where the rows of the seed's sequence begin that are independent of every sketch.
_INDEPENDENT = 1 << 31

# The part of the products that go into the vectors of a sketch: the rest multiply its basis, or
# are samples of what it leaves. So many products there are for each sample.
SKETCH_PART = {"hutch++": 3, "xtrace": 2, "xnystrace": 1}

# From one check of the standard error to the next, a sketch grows by this factor.
_GROWTH = 1.25


def exact(sampling: Sampling) -> Estimate:
    """The sum of the diagonal's entries, from n unit vectors; NaN after Ctrl-C."""
    entries, size = exact_diagonal(sampling)
    stderr = math.inf if sampling.interrupted else 0.0
    return Estimate("exact", float(np.sum(entries, dtype=np.float64)), stderr, (), size)


def hutchinson(sampling: Sampling) -> Estimate:
    """The mean of `zᵀA z` over probes with the covariance I (Hutchinson 1989)."""
    samples, stderr, size = _sample(
        sampling, sampling.deflation.vectors, 0, sampling.dimension, 0.0
    )
    sampling.warn_if_above(stderr)
    return Estimate("hutchinson", float(np.mean(samples)), stderr, samples, size)


def _sample(
    sampling: Sampling, off: Array | None, first: int, dimension: int, known: float
) -> tuple[list[float], float, float]:
    """Samples of `zᵀA z` until the budget or the standard error asked for is reached.

    Args:
        sampling: makes the products and counts them.
        off: orthonormal rows that the probes are projected off, or None.
        first: the first row of the seed's sequence.
        dimension: of the space that is left.
        known: added to the estimates that are reported.

    Returns:
        The samples, the standard error of their mean, and the operator's Frobenius norm on the
        space that is left, estimated.
    """
    distribution = sampling.distribution
    signs = distribution == "rademacher"
    samples: list[float] = []
    squares, left, scatter = 0.0, 0.0, 0.0
    mean = jnp.zeros((1, sampling.op.shape[0]), sampling.op.dtype) if signs else None
    while True:
        seen, count = len(samples), min(sampling.settings.block, sampling.left)
        block = sampling.probes(first + seen, count, off)
        products = sampling.multiply(block)
        zw, zz, ww = sampling.forms(block, products)
        squares += float(np.sum(ww))
        if off is not None:
            # The variance is that of what is left on both sides, as a form of the whole probes.
            products = probing.project_off(sampling.clock, off, products)
            block = sampling.probes(first + seen, count, None) if signs else block
            zw, _, ww = sampling.forms(block, products)
        # Uniform on the sphere of the space that is left, of the radius that its dimension gives.
        scale: Any = (
            dimension / np.maximum(zz, np.finfo(np.float64).tiny) if distribution == "sphere" else 1
        )
        samples += list(zw * scale)
        left += float(np.sum(ww * scale))
        if mean is not None:
            mean, growth = probing.scatter(
                sampling.clock, mean, block, products, host(np.float64(seen))
            )
            scatter += float(np.asarray(growth))
        stderr = math.inf
        if len(samples) > 1:
            rows = spread.row_variance(scatter, left, len(samples), distribution)
            variance = spread.of_whole(rows, np.asarray(samples), dimension, distribution)
            stderr = math.sqrt(variance / len(samples))
        sampling.note(known + float(np.mean(samples)), stderr)
        if sampling.interrupted or sampling.left == 0 or sampling.reached(len(samples), stderr):
            return samples, stderr, math.sqrt(squares / len(samples))


def hutchinson_of_blocks(sampling: Sampling, blocks: Blocks) -> dict[str, Estimate]:
    """Hutchinson's estimates of all diagonal blocks from the probes of the whole operator."""
    # What the program reads of them: the operator would be an argument once for each block.
    cuts: Any = tuple(dataclasses.replace(cut, inner=None) for cut in blocks.values())  # type: ignore[arg-type]
    sizes = [cut.shape[0] for cut in blocks.values()]
    signs = sampling.distribution == "rademacher"
    means: Any = tuple(jnp.zeros((1, size), sampling.op.dtype) for size in sizes) if signs else ()
    rows: list[FloatArray] = []
    squares, scatter = np.zeros((2, len(cuts)))
    while True:
        seen, count = len(rows), min(sampling.settings.block, sampling.left)
        block = sampling.probes(seen, count, None)
        products = sampling.multiply(block)
        sampling.forms(block, products)
        zw, ww = (
            np.asarray(x) for x in probing.forms_by_block(sampling.clock, cuts, block, products)
        )
        rows += list(zw)
        squares += ww.sum(axis=0)
        if signs:
            means, growth = probing.scatter_by_block(
                sampling.clock, cuts, means, block, products, host(np.float64(seen))
            )
            scatter += np.asarray(growth)
        samples = np.transpose(rows)
        parts = zip(scatter, squares, samples, sizes, strict=True)
        stderrs = [_stderr_of_block(sampling, *part) for part in parts]
        total = (float(np.sum(scatter)), float(np.sum(squares)), samples.sum(axis=0), sum(sizes))
        sampling.note(float(np.mean(total[2])), _stderr_of_block(sampling, *total))
        if sampling.interrupted or sampling.left == 0 or sampling.reached(len(rows), max(stderrs)):
            break
    sampling.warn_if_above(max(stderrs))
    results = {}
    for name, own, stderr, square in zip(blocks, samples, stderrs, squares, strict=True):
        size = math.sqrt(square / len(rows))
        # A block far smaller than the others is not scaled: what was read as zero is below this.
        floor = blocks[name].shape[0] * float(np.finfo(sampling.op.dtype).tiny)
        mean = float(own.mean())
        results[name] = Estimate("hutchinson", mean, stderr, list(own), size, floor)
    return results


def _stderr_of_block(
    sampling: Sampling, scatter: float, squares: float, samples: FloatArray, size: int
) -> float:
    """Of the mean of a block's samples; of the whole operator if that is its size."""
    if len(samples) < 2:
        return math.inf
    distribution, n = sampling.distribution, sampling.op.shape[0]
    rows = spread.row_variance(scatter, squares, len(samples), distribution)
    variance = spread.of_whole if size == n else spread.of_block
    return math.sqrt(variance(rows, samples, n, distribution) / len(samples))


def exchangeable(sampling: Sampling, method: str) -> Estimate:
    """XTrace or XNysTrace: the mean of the leave-one-out estimates of a sketch."""
    sketch = _sketch(sampling, method)
    for _ in _grow(sampling, sketch, sampling.settings.limit // SKETCH_PART[method]):
        estimates = sketch.estimates()
        mean, stderr = float(estimates.single.mean()), leave_one_out.stderr(estimates)
        sampling.note(mean, stderr)
        if sampling.reached(sketch.size, stderr):
            break
    sampling.warn_if_above(stderr)
    return _of_sketch(sampling, sketch, method, estimates)


def _of_sketch(sampling: Sampling, sketch: Sketch, method: str, estimates: LeaveOneOut) -> Estimate:
    single, stderr = estimates.single, leave_one_out.stderr(estimates)
    size, noise = sketch.frobenius, estimates.noise
    return Estimate(method, float(single.mean()), stderr, list(single), size, noise)


def hutch_plus_plus(sampling: Sampling) -> Estimate:
    """Hutch++ (Meyer, Musco, Musco and Woodruff 2021, algorithm 1).

    A third of the products makes a sketch, a third multiplies its basis, the rest are samples of
    what the basis leaves. With `until`, the sketch grows while that lowers the total that it and
    the samples then needed will take, by the variance that its leave-one-out estimates show (the
    idea of A-Hutch++: Persson, Cortinovis and Kressner, "Improved variants of the Hutch++
    algorithm", SIAM J. Matrix Anal. Appl. 43 (2022)). The samples are independent of all that.
    """
    sketch, until = _sketch(sampling, "hutch++"), sampling.settings.until
    fewest = math.inf
    for _ in _grow(
        sampling, sketch, min(sampling.settings.limit // 3, max(1, sampling.dimension - 1))
    ):
        if until is None and not sampling.interrupted:
            continue
        estimates = sketch.estimates()
        mean, stderr = float(estimates.single.mean()), leave_one_out.stderr(estimates)
        sampling.note(mean, stderr)
        if until is None or sampling.interrupted:
            # There are no samples of the rest, but these products are those of XTrace.
            return _of_sketch(sampling, sketch, "xtrace", estimates)
        needed = sampling.matvecs + float(np.var(estimates.single, ddof=1)) / until**2
        if needed >= fewest:
            break
        fewest = needed
    known, dimension = float(np.trace(sketch.projected)), sampling.dimension - sketch.size
    samples, stderr, _ = _sample(sampling, sketch.basis, _INDEPENDENT, dimension, known)
    sampling.warn_if_above(stderr)
    total = known + float(np.mean(samples))
    return Estimate("hutch++", total, stderr, samples, sketch.frobenius)


def _sketch(sampling: Sampling, method: str) -> Sketch:
    """An empty sketch, with room for what the products asked for will fill."""
    capacity = min(sampling.settings.planned // SKETCH_PART[method], sampling.dimension)
    return Sketch(sampling, max(1, capacity), project=method != "xnystrace")


def _grow(sampling: Sampling, sketch: Sketch, size: int) -> Iterator[None]:
    """Grow a sketch up to a size, and yield wherever its estimates are wanted.

    That is at the end, on Ctrl-C, and on the way where a standard error is asked for. After the
    blocks between, the estimate reported is the plain mean over the probes of the sketch.
    """
    size = min(size, sampling.dimension, max(sketch.capacity, _most_vectors(sampling)))
    # Whole blocks: for another number of vectors the operator's product is compiled again.
    block = sampling.settings.block
    check = (
        size if sampling.settings.until is None else min(size, block * -(-FEWEST_SAMPLES // block))
    )
    while sketch.size < size and not (sampling.interrupted and sketch.size):
        count = min(block, size - sketch.size)
        if sketch.size + count > sketch.capacity:
            sketch.reserve(min(size, 2 * sketch.capacity + count))
        sketch.extend(count)
        if sketch.size < check and not sampling.interrupted:
            sampling.note(*mean_stderr(sketch.hutchinson))
        # The callback, too, may be where the interrupt comes.
        if sketch.size >= check or sampling.interrupted:
            yield
            check = min(size, math.ceil(_GROWTH * sketch.size))


def _most_vectors(sampling: Sampling) -> int:
    """Vectors that a sketch may grow to: while it is copied, half as many are held beside them."""
    free = (
        SHARE
        * available_bytes(sampling.op)
        / (1.5 * sampling.op.shape[0] * sampling.op.dtype.itemsize)
    )
    return int(free) - sampling.deflation.count
