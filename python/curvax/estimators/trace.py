"""`trace`: the trace of a symmetric operator, or of its blocks, with an error bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict, Unpack, overload

import numpy as np

from curvax.arrays import reject_tracers
from curvax.checks import check_callback, check_choice, check_count, check_integer, check_seed
from curvax.device.probes import DISTRIBUTIONS
from curvax.estimators import arguments, trace_methods
from curvax.estimators.deflation import Deflation
from curvax.estimators.exact import chunk_size
from curvax.estimators.sampling import Estimate, Sampling, Settings
from curvax.estimators.trace_methods import SKETCH_PART
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import exponent_of, in_range, scaled_callback
from curvax.memory import SHARE, available_bytes, check_fits
from curvax.operators.base import Blocks, Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.options import takes_options
from curvax.program import Clock
from curvax.results import BlockResults, EigenResult, TraceProgress, TraceResult
from curvax.results.units import times

METHODS = ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace")

# What lets an estimate need less memory.
_SMALLER = ["use method='hutchinson', which keeps no vectors"]

# The fewest products that give an estimate and a standard error.
_FEWEST = {"auto": 4, "hutchinson": 2, "hutch++": 6, "xtrace": 4, "xnystrace": 2}

# Products at most for each that was planned, where a standard error is asked for.
_PATIENCE = 10


class TraceOptions(TypedDict, total=False):
    """Options of `trace`, which says what they mean, with their defaults."""

    method: Annotated[Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"], "auto"]
    num_matvecs: Annotated[int, 100]
    distribution: Annotated[Literal["auto", "rademacher", "gaussian", "sphere"], "auto"]
    until: Annotated[float | None, None]
    max_matvecs: Annotated[int | None, None]
    deflate: Annotated[EigenResult | None, None]
    seed: Annotated[int | None, None]
    block_size: Annotated[int | Literal["auto"], "auto"]
    callback: Annotated[Callable[[TraceProgress], object] | None, None]


@overload
def trace(A: Blocks, **options: Unpack[TraceOptions]) -> BlockResults[TraceResult]: ...


@overload
def trace(A: OperatorLike, **options: Unpack[TraceOptions]) -> TraceResult: ...


@takes_options(TraceOptions)
def trace(
    A: OperatorLike | Blocks, **options: Unpack[TraceOptions]
) -> TraceResult | BlockResults[TraceResult]:
    """Estimate the trace of a symmetric operator.

    Every estimate is unbiased if `num_matvecs` was fixed beforehand. Its interval, which allows for
    rounding errors too, holds the truth with probability 0.95, also where few eigenvalues or
    entries dominate and where `until` stopped it; of fewer than 8 samples there is none (NaN, and
    `no_interval` says why). Where `num_matvecs` is n or more, the trace is computed exactly from
    unit vectors (`method` of the result is then `"exact"`), unless `"hutchinson"` is asked for by
    name.

    Args:
        A: a curvax operator, a dense or SciPy sparse symmetric array, anything with `shape`,
            `dtype` and `matvec`; or the blocks of an operator, `op.blocks(...)`, for the trace of
            each. With Hutchinson's method every probe of the whole operator then serves all blocks
            at once: `z_bᵀ(A z)_b` also has terms from beside the block, of mean zero, which add to
            the standard error. The other methods run block by block.
        method: `"hutchinson"` averages `zᵀA z`; it holds a vector, and two for each of a block. The
            others first capture the large eigenvalues in a sketch: `"hutch++"` a third of the
            products' worth, `"xtrace"` a half, `"xnystrace"` (positive semidefinite operators only,
            which is checked on the sketch) as many vectors as products, of which each is kept.
            `"auto"` is `"xtrace"` where its vectors fit in 40 % of the free memory, else, and for
            blocks, `"hutchinson"`.
        num_matvecs: how many vectors to multiply. With `until`, what `max_matvecs` follows from.
        distribution: of the probes. `"auto"` is `"sphere"` (uniform on the sphere of radius √n) for
            `"xtrace"` and `"xnystrace"`, which scale what the sketch leaves to its expected
            length if probes are invariant under rotations, and `"rademacher"` (±1) for the others:
            Hutchinson's method is then exact on diagonal operators.
        until: a standard error to reach. Products are made until it is, on at least 10 samples, or
            until `max_matvecs`; a sketch grows.
        max_matvecs: the most products with `until`; by default `10 · num_matvecs`.
        deflate: what `eigsh` returned for this operator. The trace on the span of its vectors is
            measured, by one product more of each, and only the rest is estimated. The vectors need
            not have converged.
        seed: seed of all random numbers; the same seed gives the same estimate, to rounding
            whatever `block_size` is. Drawn if None, and recorded in the result.
        block_size: vectors per product, up to 32. By default 1 on a CPU, else 4. An exact trace
            takes more.
        callback: called with a `TraceProgress` after each block. While a sketch grows, its
            estimate is the plain mean over the probes so far; for blocks, that of their sum.

    Returns:
        The estimate, its standard error and interval; after Ctrl-C, of the samples so far (NaN for
        an exact trace; by XTrace's formula where Hutch++ has no samples yet). For blocks, these by
        name, of those that were reached; products that serve several blocks are counted in each.

    Raises:
        TypeError: an argument of a wrong type, or a call inside a transformation such as `jit`.
        ValueError: an argument out of range; for `"xtrace"` an operator measured not to be
            symmetric, for `"xnystrace"` not to be positive semidefinite; `deflate` holds pairs that
            are measured to be another operator's.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: the sketch of a method asked for by name does not fit in the free memory, or
            memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.

    References:
        M. Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines", Commun. Stat. Simul. Comput. 18 (1989). R. Meyer, C. Musco, C. Musco and
        D. Woodruff, "Hutch++: optimal stochastic trace estimation", SOSA 2021. E. Epperly, J. Tropp
        and R. Webber, "XTrace: making the most of every sample in stochastic trace estimation",
        SIAM J. Matrix Anal. Appl. 45 (2024); the standard errors of its methods allow for the
        correlation of their samples, see `curvax.estimators.leave_one_out`.
    """
    whole = A.whole if isinstance(A, Blocks) else A
    reject_tracers("trace", whole, options["deflate"])
    op = as_operator(whole)
    request = _Request.of(op, **options)
    smaller = [] if request.method == "hutchinson" else _SMALLER
    explained = Explained(op, smaller, request.block)
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):
        if not isinstance(A, Blocks):
            return _in_range(op, request, interrupted)
        if request.deflate is not None:
            raise ValueError(
                "deflate belongs to one operator: call trace(block, deflate=...) for each block, "
                "with its own pairs"
            )
        return _trace_blocks(A, request, interrupted)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What was asked for, checked."""

    method: str
    num_matvecs: int
    distribution: str
    until: float | None
    max_matvecs: int | None
    deflate: EigenResult | None
    seed: int
    block: int
    callback: Callable[[TraceProgress], object] | None

    @classmethod
    def of(cls, op: Operator, **options: Unpack[TraceOptions]) -> _Request:
        """Check the arguments of `trace`; see there for what they mean and what is raised."""
        until = arguments.check_until(options["until"])
        most = check_integer("max_matvecs", options["max_matvecs"], low=1)
        if until is None and most is not None:
            raise ValueError("max_matvecs is the limit for until=: without that, give num_matvecs")
        distributions = ("auto", *DISTRIBUTIONS)
        return cls(
            method=check_choice("method", options["method"], METHODS),
            num_matvecs=check_count("num_matvecs", options["num_matvecs"], low=1),
            distribution=check_choice("distribution", options["distribution"], distributions),
            until=until,
            max_matvecs=most,
            deflate=options["deflate"],
            seed=check_seed(options["seed"]),
            block=arguments.check_block(options["block_size"], op.shape[0]),
            callback=check_callback(options["callback"]),
        )

    def scaled_to(self, scaled: Operator) -> _Request:
        """The same in the units of a multiple of the operator."""
        until = None if self.until is None else times(self.until, exponent_of(scaled))
        callback = scaled_callback(scaled, self.callback)
        return dataclasses.replace(self, until=until, callback=callback)

    def settle(self, method: str, n: int) -> Settings:
        """Decide what is left open, for a method."""
        limit = self.num_matvecs
        if self.until is not None:
            limit = self.max_matvecs or _PATIENCE * self.num_matvecs
        fewest = _FEWEST[method]
        if limit < fewest:
            name = "num_matvecs" if self.until is None else "max_matvecs"
            raise ValueError(
                f"{name} must be at least {fewest} with method={method!r}, got {limit}"
            )
        distribution = self.distribution
        if distribution == "auto":
            distribution = "sphere" if method in ("xtrace", "xnystrace") else "rademacher"
        return Settings(
            planned=min(self.num_matvecs, limit),
            limit=limit,
            distribution=distribution,
            until=self.until,
            seed=self.seed,
            block=min(self.block, n),
            callback=self.callback,
        )


def _in_range(op: Operator, request: _Request, interrupted: InterruptFlag) -> TraceResult:
    return in_range(op, lambda scaled: _trace(scaled, request.scaled_to(scaled), interrupted))


def _trace(op: Operator, request: _Request, interrupted: InterruptFlag) -> TraceResult:
    n, clock = op.shape[0], Clock("products", "host")
    if n <= request.num_matvecs and request.method != "hutchinson":
        settings = Settings(
            planned=n,
            limit=n,
            distribution="unit",
            until=request.until,
            seed=request.seed,
            block=chunk_size(op, clock),
            callback=request.callback,
        )
        sampling = Sampling(op, settings, interrupted, clock)
        return _result(sampling, trace_methods.exact(sampling))
    deflation = Deflation.of(op, request.deflate, request.block, clock)
    vectors = {
        name: request.num_matvecs // part + deflation.count for name, part in SKETCH_PART.items()
    }
    method = request.method
    if method == "auto":
        fits = vectors["xtrace"] * n * op.dtype.itemsize <= SHARE * available_bytes(op)
        method = "xtrace" if fits else "hutchinson"
    sampling = Sampling(op, request.settle(method, n), interrupted, clock, deflation)
    if method == "hutchinson":
        found = trace_methods.hutchinson(sampling)
    else:
        _check_memory(sampling, request, method, vectors[method])
        if method == "hutch++":
            found = trace_methods.hutch_plus_plus(sampling)
        else:
            found = trace_methods.exchangeable(sampling, method)
    return _result(sampling, found)


def _check_memory(sampling: Sampling, request: _Request, method: str, vectors: int) -> None:
    op = sampling.op
    check_fits(
        (vectors + 3 * sampling.settings.block) * op.shape[0] * op.dtype.itemsize,
        op,
        f"method={method!r} with num_matvecs={request.num_matvecs} keeps {vectors} vectors, which "
        "with those in work need",
        "lower num_matvecs, or use method='hutchinson'",
    )


def _result(sampling: Sampling, found: Estimate) -> TraceResult:
    s, total = sampling.settings, sampling.deflation.value + found.value
    own = arguments.ROUNDINGS * sampling.eps * found.size
    count, stopped = len(found.samples), s.until is not None
    shared = found.method in ("xtrace", "xnystrace")
    rounding = sampling.deflation.rounding + own + found.noise
    ends = arguments.interval(total, found.stderr, count, shared, rounding, stopped)
    return TraceResult(
        estimate=total,
        stderr=found.stderr,
        interval=ends,
        samples=np.asarray(found.samples, np.float64),
        method=found.method,
        distribution=s.distribution,
        num_matvecs=sampling.matvecs + sampling.deflation.matvecs,
        num_deflated=sampling.deflation.count,
        block_size=s.block,
        seed=s.seed,
        history=tuple(sampling.history),
        seconds=sampling.clock.parts(),
        interrupted=bool(sampling.interrupted),
        no_interval=arguments.missing_interval(ends, count, SKETCH_PART.get(found.method, 1)),
    )


def _trace_blocks(
    blocks: Blocks, request: _Request, interrupted: InterruptFlag
) -> BlockResults[TraceResult]:
    whole = blocks.whole
    exact = whole.shape[0] <= request.num_matvecs
    sizes = {name: op.shape[0] for name, op in blocks.items()}
    if request.method == "hutchinson" or (request.method == "auto" and not exact):

        def attempt(scaled: Operator) -> BlockResults[TraceResult]:
            settings = request.scaled_to(scaled).settle("hutchinson", whole.shape[0])
            sampling = Sampling(scaled, settings, interrupted, Clock("products", "host"))
            found = trace_methods.hutchinson_of_blocks(sampling, blocks)
            return BlockResults(
                {name: _result(sampling, own) for name, own in found.items()}, sizes
            )

        return in_range(whole, attempt)
    # Independent of each other, so that the errors of a sum add up as squares.
    states = np.random.SeedSequence(request.seed).generate_state(len(blocks))
    seeds = dict(zip(blocks, states, strict=True))
    results: dict[str, TraceResult] = {}
    for name, op in blocks.alike():
        own = dataclasses.replace(request, seed=int(seeds[name]))
        results[name] = _in_range(op, own, interrupted)
        if interrupted:
            break
    results = blocks.ordered(results)
    return BlockResults(results, {name: sizes[name] for name in results})
