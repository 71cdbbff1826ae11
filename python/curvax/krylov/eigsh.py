"""`eigsh`: extreme eigenpairs of a symmetric operator, with certificates."""

from __future__ import annotations

import dataclasses
from typing import Unpack, overload

import numpy as np

from curvax.arrays import reject_tracers
from curvax.device.programs import solve_clock
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.dense import DenseSolve
from curvax.krylov.failures import Explained
from curvax.krylov.plan import choose_to_fit
from curvax.krylov.request import EigshOptions, Request
from curvax.krylov.scaling import in_range, scaled_callback
from curvax.krylov.selection import Wanted
from curvax.krylov.start import starting_block
from curvax.krylov.thick_restart import Solve
from curvax.operators.base import Blocks, Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.options import takes_options
from curvax.results import BlockResults, EigenResult, numbered
from curvax.typing import FloatArray, IntArray, Vector


@overload
def eigsh(
    A: Blocks, k: int | tuple[int, int], **options: Unpack[EigshOptions]
) -> BlockResults[EigenResult]: ...


@overload
def eigsh(
    A: OperatorLike, k: int | tuple[int, int], **options: Unpack[EigshOptions]
) -> EigenResult: ...


@takes_options(EigshOptions)
def eigsh(
    A: OperatorLike | Blocks, k: int | tuple[int, int], **options: Unpack[EigshOptions]
) -> EigenResult | BlockResults[EigenResult]:
    """Find k extreme eigenpairs of a symmetric operator by thick-restart block Lanczos.

    The names are those of `scipy.sparse.linalg.eigsh`. The Krylov basis stays on the device; the
    host sees small matrices, once per block. A pair counts as converged if its residual,
    *measured* with a fresh product after the solve, is at most `tol` times what `relative_to` says.
    A small residual proves that an eigenvalue is near, not that none was missed: see `certify`.

    Where the basis may hold n vectors, and n products are allowed, the matrix is formed by those
    products and decomposed instead, which finds every eigenvalue (`complete` is then True).

    Args:
        A: a curvax operator, the diagonal blocks of one (`op.blocks(...)`), a dense or SciPy sparse
            symmetric array, or anything with `shape`, `dtype` and `matvec`, such as SciPy's
            `LinearOperator`.
        k: how many pairs, from 1 to n. With `which="BE"` also a pair `(high, low)`.
        which: `"LM"` largest magnitude (the default), `"LA"` largest, `"SA"` smallest, `"BE"` both
            ends (half, rounded up, from the high end).
        tol: allowed residual, relative; by default 1e-3, and 0 asks for what the dtypes allow.
        relative_to: what `tol` is relative to: `"largest"`, the largest absolute eigenvalue (by
            default for LM and LA); `"end"`, the outermost eigenvalue of the pair's end of the
            spectrum (by default for SA and BE, whose low end is often a hundredth of the high one);
            or `"each"`, the eigenvalue itself, as ARPACK does. Never below `tol²·|λ|max`, or what
            the noise of the products allows. With `"end"`, one that has not reached beyond zero,
            and whose outermost value is zero within its residual, as the low end of a semidefinite
            matrix, is taken relative to the largest: it is known to be zero within its bounds,
            which may hide a negative end smaller than they are. `"each"` goes on until it shows.
        v0: where to start: a vector, a block of vectors (a leading axis), either of them flat, or
            an earlier `EigenResult`. Random if None. A tenth of a random vector is mixed into a
            start of one's own, and the solve goes on until an eigenvalue that exceeds a wanted one
            by 3 % of |λ|max (or three tolerances) would have shown from that: a start in an
            invariant subspace is left.
        seed: seed of all random numbers; the same seed gives the same bits. Drawn if None, and
            recorded in the result.
        block_size: vectors per product, up to 32. `"auto"`, the default, takes a fixed table (1 on
            a CPU); `"tune"` measures. A larger block needs more products but finds up to that many
            copies of a multiple eigenvalue.
        max_basis: the most vectors that the basis may hold, at least `k + 4·block_size`. By
            default `max(3k, k + 64) + 2·block_size`, or less where the rank is known to be low
            (`A.rank_bound`), or what fits in the part of the free memory that `plan` gives to it.
        max_matvecs: the most products of the solve; verification takes k more, rounded up to whole
            blocks. By default `min(10n, max(1000, 100k))`.
        basis_dtype: how the basis is stored: in the dtype of the operator (None) or, for one in
            float32, in `"float16"` or `"bfloat16"`, which take half of the memory. The product is
            applied to the rounded vectors and residuals are measured on them, so that nothing is
            lost but what they show: `tol` is at least 3.1e-4 in float16 and 2.5e-3 in bfloat16.
            Eigenvalues, being Rayleigh quotients, move by the square of a rounding: 1e-7 and 5e-6
            of |λ|max, times the number of restarts if it is large. `"auto"` chooses as `plan` does.
        certify: `"residuals"`, the default, measures every pair's residual. `"sampled"` checks
            three random signed sums of the pairs, instead of k products; the values are then those
            of the projection, which a 16-bit basis moves by up to its roundoff (2e-4 of |λ|max in
            float16), or that over √n for eigenvectors spread over all entries. `"complete"` also
            searches, from random blocks orthogonal to the found pairs, for eigenvalues that were
            missed, and adds them. Each search goes on until one further out than the tolerance
            would have shown, whatever its multiplicity, but for one start in a thousand.
        callback: called with a `Progress` after each block.
        return_eigenvectors: whether to return the vectors, as by default.

    Returns:
        For `Blocks`, a mapping of results, block after block; of a smaller block all pairs. Else
        the pairs, in descending order of the values whatever `which` is, and what was measured of
        them. A pair does not count as converged while one not wanted could still displace it. Pairs
        that did not converge are returned too, marked, with a `ConvergenceWarning`. After Ctrl-C:
        what was known, marked not converged, with an `InterruptWarning`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, an operator that is measured not to be symmetric, or
            one whose products come in shards.
        FloatingPointError: a product is not finite, or A holds numbers so small that they are read
            as zero.
        MemoryError: the solve would not fit in the free memory; the message holds the forecast.
        OutOfMemory: memory ran out on the way, a `MemoryError` too. What was known by then is the
            error's attribute `result`.
        KernelFailure: a compiled kernel could not be run, a `RuntimeError`; likewise with `result`.

    References:
        K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
        problems", SIAM J. Matrix Anal. Appl. 22 (2000), section 2; Y. Zhou and Y. Saad, "Block
        Krylov-Schur method for large symmetric eigenvalue problems", Numer. Algor. 47 (2008). When
        a search ends: J. van Dorsselaer, M. Hochstenbach and H. van der Vorst, "Computing
        probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos method",
        SIAM J. Matrix Anal. Appl. 22 (2000); see `curvax.krylov.exclusion`.
    """
    return _over_blocks(A, k, options) if isinstance(A, Blocks) else _solve(A, k, options)


def _over_blocks(blocks: Blocks, k: object, options: EigshOptions) -> BlockResults[EigenResult]:
    v0 = options["v0"]
    if v0 is not None and not isinstance(v0, BlockResults):
        raise TypeError(
            "v0, for the blocks of an operator, must be the BlockResults of an earlier call or "
            f"None, got {type(v0).__name__}"
        )
    results: dict[str, EigenResult] = {}
    with InterruptFlag() as interrupted, kept():
        for name, op in blocks.alike():
            start = None if v0 is None else v0.get(name)
            try:
                results[name] = _solve(op, *_fitted(op.shape[0], k, start, options))
            except Exception as error:
                error.add_note(f"in the block {name!r}")
                raise
            if interrupted or results[name].interrupted:
                break
    results = blocks.ordered(results)
    return BlockResults(results, {name: blocks[name].shape[0] for name in results})


def _fitted(n: int, k: object, start: Vector, options: EigshOptions) -> tuple[object, EigshOptions]:
    """The arguments of `_solve` for a block of n parameters: of a small one, all pairs."""
    fitted: EigshOptions = {**options, "v0": start}
    if isinstance(k, (int, np.integer)):
        k = min(int(k), n)
    elif isinstance(k, tuple) and all(isinstance(x, (int, np.integer)) for x in k) and sum(k) > n:
        k, fitted["which"] = n, "LM"
    block = options["block_size"]
    if isinstance(block, (int, np.integer)) and block > n:
        fitted["block_size"] = n
    return k, fitted


def _solve(A: OperatorLike, k: object, options: EigshOptions) -> EigenResult:
    reject_tracers("eigsh", A, options["v0"])
    op, clock = as_operator(A), solve_clock()
    with Explained(op) as explained, original_errors(op):
        request = Request.of(op, k, **options)
        explained.plan = plan = choose_to_fit(op, request, clock)
        with InterruptFlag() as interrupted, kept():

            def attempt(scaled: Operator) -> EigenResult:
                callback = scaled_callback(scaled, request.callback)
                own = dataclasses.replace(request, callback=callback)
                start = starting_block(scaled, own, plan.block_size)
                if plan.dense:
                    dense = DenseSolve(scaled, own, plan, interrupted, clock)
                    with explained.follows(dense):
                        return dense.run()
                with explained.follows(Solve(scaled, own, plan, interrupted, clock)) as solve:
                    return solve.run(start)

            result = in_range(op, attempt)
        indices = _places(request.wanted, result.eigenvalues)
        return dataclasses.replace(result, indices=indices)


def _places(wanted: Wanted, values: FloatArray) -> IntArray:
    """Where in the spectrum the found values stand."""
    if len(values) < wanted.k:  # interrupted so early that it is not known which these are
        return np.zeros(len(values), np.intp)
    return numbered(wanted.k, int(np.sum(values < 0)) if wanted.which == "LM" else wanted.low)
