"""One solve: iterate, certify, search for what was missed, and report."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import Array

from curvax.compiled import Clock
from curvax.interrupt import InterruptFlag
from curvax.krylov import programs, storage
from curvax.krylov.certificates import (
    Certificate,
    attainable,
    effective_tolerance,
    estimate_errors,
    measure,
    measure_sampled,
    orthogonality,
    warn_raised,
)
from curvax.krylov.lanczos import Lanczos, Matrix, Ritz
from curvax.krylov.selection import Indices
from curvax.krylov.settings import Settings
from curvax.operators.base import Operator
from curvax.results import EigenResult, Matvecs, Progress, warn_unconverged

# A search for missed pairs is at least this long, in products, whatever the solve took: enough for
# a random block to show an eigenvalue outside the bulk.
_SHORTEST_SEARCH = 20


# Products after the Krylov space has closed: a random direction shows an eigenvalue that stands out
# of the rest within a few steps.
_BEYOND_CLOSURE = 5

# An unwanted pair may rank next to the wanted ones for ever, in a cluster: it counts as settled at
# this multiple of the tolerance.
_SETTLED = 3.0


@dataclasses.dataclass
class _Pairs:
    """Ritz pairs that lie in the first rows of the basis.

    Attributes:
        values: their Ritz values, the wanted ones first in order of preference.
        predicted: `(k,)` the residuals that the recurrence estimates.
        others: Ritz values that were not wanted.
        doubtful: `(k,)` whether one not wanted, far from converged, could still displace it.
        scale: |λ|max.
    """

    values: Matrix
    predicted: Matrix
    others: Matrix
    doubtful: np.ndarray[Any, np.dtype[np.bool_]]
    scale: float


class Solve:
    """The driver of a `Lanczos` state."""

    def __init__(
        self, op: Operator, settings: Settings, interrupted: InterruptFlag, clock: Clock
    ) -> None:
        self.op = op
        self.settings = settings
        self.interrupted = interrupted
        self.clock = clock
        self.tol = max(settings.tol, attainable(op.dtype, settings.basis_dtype))
        self.noise = 0.0
        self.verification = 0
        self.history: list[Progress] = []
        # Whether the products ran out before directions beyond the start had time to show.
        self._cut_short = False
        self.state = Lanczos(
            op, settings.rows, settings.block, settings.basis_dtype, settings.seed, self.clock
        )

    def run(self, start: Array | None, warm: bool) -> EigenResult:
        """Solve from a starting block (random if None) and report."""
        self.state.start(self.state.random_block() if start is None else start)
        # A start near other eigenvectors has all but nothing of the wanted ones at first.
        shortest = self.settings.wanted.k + self._beyond if warm else 0
        pairs, certificate = self._converge(shortest)
        complete = None
        if self.settings.certify == "complete" and certificate is not None:
            length = max(self.solve_matvecs, _SHORTEST_SEARCH)
            length = max(length, 3 * self.settings.wanted.k) if warm else length
            pairs, certificate, complete = self._search(pairs, certificate, length)
        return self._report(pairs, certificate, complete)

    @property
    def solve_matvecs(self) -> int:
        """Products so far, without those of the verification."""
        return self.state.matvecs - self.verification

    @property
    def _exhausted(self) -> bool:
        return self.solve_matvecs + self.settings.block > self.settings.max_matvecs

    @property
    def _beyond(self) -> int:
        """Products that random directions get to show an eigenvalue that stands out."""
        return max(_BEYOND_CLOSURE, 4 * self.settings.block)

    def _converge(self, shortest: int) -> tuple[_Pairs, Certificate | None]:
        """Iterate and certify until the measured residuals are within the tolerance."""
        # The recurrence sees neither the rounding of stored vectors nor the noise of products.
        target = math.sqrt(self.tol**2 - storage.noise(self.settings.basis_dtype) ** 2)
        while True:
            ritz, order = self._iterate(target, shortest)
            shortest = 0
            pairs = self._settle(ritz, order)
            pairs.doubtful[:] |= self._cut_short
            if self.interrupted:
                return pairs, None
            certificate = self._certify(pairs)
            if self._judge(certificate, pairs.scale) or self._exhausted:
                return pairs, certificate
            # Too hopeful by the noise, which adds in squares.
            target = min(math.sqrt(max(self.tol**2 - self.noise**2, 0.0)), target) / 2

    def _judge(self, certificate: Certificate, scale: float) -> bool:
        """Whether every pair is within the tolerance, raised first to what the noise allows."""
        self.noise = max(self.noise, certificate.noise)
        if np.all(certificate.residuals <= self.tol * scale):
            return True
        noise = max(self.noise, self.state.asymmetry)
        self.tol = effective_tolerance(self.tol, noise, self.op.dtype, self.settings.basis_dtype)
        return bool(np.all(certificate.residuals <= self.tol * scale))

    def _iterate(self, target: float, shortest: int = 0) -> tuple[Ritz, Indices]:
        """Step until the wanted pairs' estimated residuals are within `target`, relatively.

        At least `shortest` products are made. Ends early at Ctrl-C or out of products.
        """
        state, wanted, begun = self.state, self.settings.wanted, self.solve_matvecs
        ritz, closed = state.ritz() if state.used else None, None
        while True:
            if state.full:
                assert ritz is not None  # a full basis has columns
                state.restart(ritz, self._kept(wanted.order(ritz.values)))
            state.step()
            ritz = state.ritz()
            order = wanted.order(ritz.values)
            enough = len(order) >= wanted.k
            relative = ritz.residuals[order[: wanted.k]] / (ritz.scale or 1.0)
            self._note(ritz, relative if enough else np.full(wanted.k, np.inf))
            converged = enough and bool(np.all(relative <= target))
            converged = converged and not self._doubtful(ritz, order).any()
            if state.replaced or np.all(ritz.residuals <= self.tol * ritz.scale):
                closed = self.solve_matvecs if closed is None else closed
            if closed is not None:
                # Every residual was small whatever lies outside the Krylov space, as from a start
                # in an invariant subspace: the random directions that follow get time to show it.
                converged = converged and self.solve_matvecs - closed >= self._beyond
            made = self.solve_matvecs - begun
            done = converged and made >= shortest
            self._cut_short = made < shortest or (
                closed is not None and self.solve_matvecs - closed < self._beyond
            )
            if done or self._exhausted or self.interrupted:
                return ritz, order

    def _doubtful(self, ritz: Ritz, order: Indices) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether an unwanted Ritz pair, far from converged, could still displace each wanted."""
        settled = _SETTLED * self.tol * ritz.scale
        return self.settings.wanted.doubtful(ritz.values, ritz.residuals, order, settled)

    def _note(self, ritz: Ritz, relative: Matrix) -> None:
        progress = Progress(
            matvecs=self.solve_matvecs,
            converged=int(np.sum(relative <= self.tol)),
            k=self.settings.wanted.k,
            residual=float(relative.max()),
            tol=self.tol,
            max_matvecs=self.settings.max_matvecs,
            restarts=self.state.restarts,
            largest=ritz.scale,
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.settings.callback is not None:
            self.settings.callback(progress)

    def _kept(self, order: Indices) -> Indices:
        """Which Ritz pairs survive a restart: the wanted, and 40 % of the room beyond them."""
        k, m = self.settings.wanted.k, len(order)
        room = self.settings.rows - 2 * self.settings.block
        return order[: max(min(k + int(0.4 * (m - k)), room), min(k, m))]

    def _settle(self, ritz: Ritz, order: Indices) -> _Pairs:
        """Turn the first rows of the basis into Ritz vectors, the wanted first."""
        chosen = order[: self.settings.wanted.k]
        self.state.restart(ritz, self._kept(order))
        self.state.restarts -= 1  # the basis was not full
        return _Pairs(
            ritz.values[chosen],
            ritz.residuals[chosen],
            ritz.values[order[self.settings.wanted.k :]],
            self._doubtful(ritz, order),
            ritz.scale,
        )

    def _certify(self, pairs: _Pairs) -> Certificate:
        before = self.state.matvecs
        with self.clock.part("verification"):
            if self.settings.certify == "sampled":
                certificate = measure_sampled(
                    self.state, pairs.values, pairs.predicted, pairs.scale
                )
            else:
                certificate = measure(self.state, pairs.predicted, pairs.scale)
        self.verification += self.state.matvecs - before
        return certificate

    def _search(
        self, pairs: _Pairs, certificate: Certificate, length: int
    ) -> tuple[_Pairs, Certificate, bool]:
        """Look for missed pairs in the complement of those found, until a search finds none.

        A pair that the solve missed has no component in its Krylov space. From a random block
        orthogonal to the found pairs it converges no later than the last of them did, having
        fewer eigenvalues beyond it; hence the length of a search.
        """
        k = self.settings.wanted.k
        while not (self._exhausted or self.interrupted):
            restarts = self.state.restarts
            self.state.drop(k)
            self.state.start(self.state.random_block())
            begun = self.solve_matvecs
            ritz, order = self._iterate(self.tol / 2, shortest=length)
            finished = self.solve_matvecs - begun >= length
            finished = finished and not self._doubtful(ritz, order).any()
            change = np.abs(np.sort(ritz.values[order[:k]]) - np.sort(pairs.values)).max()
            unchanged = bool(change <= 0.1 * self.tol * ritz.scale)
            if unchanged and self.state.restarts == restarts:
                return pairs, certificate, finished  # the verified rows were not touched
            pairs = self._settle(ritz, order)
            certificate = self._certify(pairs)
            if unchanged:
                return pairs, certificate, finished
        return pairs, certificate, False

    def _report(
        self, pairs: _Pairs, certificate: Certificate | None, complete: bool | None
    ) -> EigenResult:
        settings, state = self.settings, self.state
        k = len(pairs.values)
        if certificate is None:
            values, residuals = pairs.values, np.full(k, np.nan)
            errors = estimate_errors(values, pairs.predicted, pairs.others)
            converged = np.zeros(k, bool)
        else:
            values, residuals = certificate.values, certificate.residuals
            errors = estimate_errors(values, residuals, pairs.others)
            converged = (residuals <= self.tol * pairs.scale) & ~pairs.doubtful
        with self.clock.part("verification"):
            loss = orthogonality(state, k)
        self._warn(converged)
        down = np.argsort(-values, kind="stable")
        vectors = self._vectors(down) if settings.return_eigenvectors else None
        return EigenResult(
            eigenvalues=values[down],
            eigenvectors=vectors,
            residuals=residuals[down],
            bounds=residuals[down],
            estimated_errors=errors[down],
            converged=converged[down],
            complete=complete,
            orthogonality=loss,
            noise=max(self.noise, state.asymmetry),
            tol_effective=self.tol,
            num_matvecs=Matvecs(self.solve_matvecs, self.verification),
            num_restarts=state.restarts,
            block_size=settings.block,
            seed=settings.seed,
            history=tuple(self.history),
            seconds={**self.clock.seconds, "total": self.clock.total()},
            interrupted=bool(self.interrupted),
        )

    def _vectors(self, order: Indices) -> Any:
        """The rows `order` as vectors of the operator. The basis is gone before they are wide."""
        rows = programs.take(self.clock, self.state.basis, order.astype(np.int32))
        jax.block_until_ready(rows)
        self.state.basis.delete()
        return programs.deliver(self.clock, self.op, rows)

    def _warn(self, converged: Any) -> None:
        if self.interrupted:
            return
        settings = self.settings
        warn_raised(settings.tol, self.tol, self.op.dtype, settings.basis_dtype)
        if not converged.all():
            remedy = f"raise max_matvecs ({settings.max_matvecs}) or tol ({self.tol:.3g})"
            found = int(converged.sum())
            warn_unconverged(found, settings.wanted.k, self.solve_matvecs, remedy)
