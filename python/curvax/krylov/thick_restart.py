"""One solve: iterate, certify, search for what was missed, and report."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from curvax.device import programs, storage
from curvax.interrupt import InterruptFlag
from curvax.krylov.certificates import (
    Certificate,
    Pairs,
    estimate_errors,
    measure,
    measure_sampled,
    orthogonality,
    unmeasured,
)
from curvax.krylov.exclusion import needed_growth
from curvax.krylov.lanczos import Lanczos, Ritz
from curvax.krylov.plan import Plan
from curvax.krylov.request import Request
from curvax.krylov.selection import SETTLED, Indices
from curvax.krylov.start import COLD, WARM, Start
from curvax.krylov.tolerance import Tolerance
from curvax.operators.base import Operator
from curvax.program import Clock
from curvax.results import EigenResult, Progress
from curvax.typing import Float64Array, IntArray
from curvax.warnings import warn_unconverged

# Products after the Krylov space has closed: a random direction shows an eigenvalue that stands out
# of the rest within a few steps.
_BEYOND_CLOSURE = 5


# From the random block of a search, even a component that one start in a thousand has would show.
_RARE = 1e-3


class Solve:
    """The driver of a `Lanczos` state."""

    def __init__(
        self,
        op: Operator,
        request: Request,
        plan: Plan,
        interrupted: InterruptFlag,
        clock: Clock,
    ) -> None:
        self.op = op
        self.request = request
        self.plan = plan
        self.interrupted = interrupted
        self.clock = clock
        self.tolerance = Tolerance(
            request.wanted, request.tol, request.relative_to, op.dtype, plan.basis_dtype
        )
        self.noise = 0.0
        self.verification = 0
        self.history: list[Progress] = []
        # Which pairs something may displace that had no time to show before products ran out.
        self._cut_short: Any = False
        self._searching = False
        # The pairs in the first rows of the basis and what was measured of them; whether they have
        # gone from there; and whether a failure ended the solve.
        self._found: tuple[Pairs, Certificate] | None = None
        self._lost = self._failed = False
        self.state = Lanczos(
            op, plan.max_basis, plan.block_size, plan.basis_dtype, request.seed, self.clock
        )

    def run(self, start: Array | None) -> EigenResult:
        """Solve from a starting block (random if None) and report."""
        self.state.start(self.state.random_block() if start is None else start)
        pairs, certificate = self._converge(COLD if start is None else WARM)
        complete = None
        if self.request.certify == "complete" and not self.interrupted:
            pairs, certificate, complete = self._search(pairs, certificate)
        return self._report(pairs, certificate, complete)

    def salvage(self) -> EigenResult | None:
        """What is known after a failure, without another product; None if that is nothing.

        With the vectors, if the basis is still there and memory for them.
        """
        if not self.state.known:
            return None
        self._failed = True
        self.state.forget_unread()
        ritz = self.state.ritz()
        order = self.request.wanted.order(ritz.values)
        try:
            if self._found is None:
                self._settle(ritz, order, 0.0)
            assert self._found is not None
            return self._report(*self._found, None)
        except (RuntimeError, ValueError, MemoryError):  # no memory, or a basis given away
            self._lost = True
            return self._report(*self._found or unmeasured(self._pairs(ritz, order, 0.0)), None)

    @property
    def made(self) -> int:
        """Products so far."""
        return self.state.matvecs

    @property
    def solve_matvecs(self) -> int:
        """Products so far, without those of the verification."""
        return self.state.matvecs - self.verification

    @property
    def _steps_left(self) -> int:
        """Steps that may still be begun."""
        done = self.solve_matvecs + self.state.unread
        return (self.plan.max_matvecs - done) // self.plan.block_size

    @property
    def _exhausted(self) -> bool:
        return self._steps_left < 1 and not self.state.unread

    @property
    def _beyond(self) -> int:
        """Products that random directions get to show an eigenvalue that stands out."""
        return max(_BEYOND_CLOSURE, 4 * self.plan.block_size)

    def _converge(self, start: Start) -> tuple[Pairs, Certificate]:
        """Iterate and certify until the measured residuals are within the tolerance."""
        # The recurrence sees neither the rounding of stored vectors nor the noise of products.
        fraction, unseen = 1.0, storage.noise(self.plan.basis_dtype)
        while True:
            hidden = functools.partial(self._overtaking, start)
            ritz, order = self._iterate(fraction, unseen, hidden)
            pairs = self._settle(ritz, order, 0.0)
            pairs.doubtful |= self._cut_short
            certificate = self._certify(pairs)
            if self._judge(certificate, pairs.scale) or self._exhausted or self.interrupted:
                return pairs, certificate
            # Too hopeful by the noise, which adds in squares.
            fraction, unseen = fraction / 2, max(unseen, self.noise)

    def _judge(self, certificate: Certificate, scale: float) -> bool:
        """Whether every pair is within the tolerance, raised first to what the noise allows."""
        self.noise = max(self.noise, certificate.noise)

        def good() -> bool:
            return bool(np.all(certificate.residuals <= self._certified(certificate, scale)))

        if good():
            return True
        self.tolerance.admit(max(self.noise, self.state.asymmetry))
        return good()

    def _allowed(self, ritz: Ritz, order: Indices) -> Float64Array:
        """The residual allowed of each wanted pair that there is."""
        chosen = order[: self.request.wanted.k]
        return self.tolerance.allowed(ritz.values[chosen], ritz.residuals[chosen], ritz.scale)

    def _certified(self, certificate: Certificate, scale: float) -> Float64Array:
        return self.tolerance.allowed(certificate.values, certificate.residuals, scale)

    def _iterate(
        self, fraction: float, unseen: float, hidden: Callable[[Ritz, Indices], Float64Array]
    ) -> tuple[Ritz, Indices]:
        """Step until the wanted pairs' estimated residuals are within a part of the tolerance.

        Ends early at Ctrl-C or out of products.

        Args:
            fraction: that part.
            unseen: what measured residuals hold beside the estimated, in squares, relative to
                |λ|max.
            hidden: where eigenvalues that belong among the wanted may not have shown yet.
        """
        state, wanted = self.state, self.request.wanted
        ritz, closed, ended = state.ritz() if state.used else None, None, False
        if not self._searching:
            self._found = None
        while True:
            if state.full and not state.unread:
                assert ritz is not None  # a full basis has columns
                self._lost = self._found is not None
                state.restart(ritz, self._kept(ritz, wanted.order(ritz.values)))
            # Steps that were begun before the end was seen are read: they are paid for.
            state.step(0 if ended else self._steps_left)
            ritz = state.ritz()
            order = wanted.order(ritz.values)
            chosen = order[: wanted.k]
            allowed = self._allowed(ritz, order)
            self._note(ritz, ritz.residuals[chosen], allowed)
            target = fraction * np.sqrt(np.maximum(allowed**2 - (unseen * ritz.scale) ** 2, 0))
            enough = len(order) >= wanted.k
            converged = enough and bool(
                np.all(ritz.residuals[chosen] <= target)
                and not wanted.doubtful(ritz.values, ritz.residuals, order, allowed).any()
            )
            if state.replaced or np.all(ritz.residuals <= self.tolerance.of_largest * ritz.scale):
                closed = self.solve_matvecs if closed is None else closed
            # Every residual was small whatever lies outside the Krylov space, as from a start in an
            # invariant subspace: the random directions that follow get time to show it.
            early = closed is not None and self.solve_matvecs - closed < self._beyond
            over = self._exhausted or bool(self.interrupted)
            self._cut_short = np.full(len(chosen), early)
            if enough and (converged or over):
                self._cut_short |= wanted.displaced(ritz.values[chosen], hidden(ritz, order))
            ended = over or (converged and not self._cut_short.any())
            if ended and not state.unread:
                return ritz, order

    def _overtaking(self, start: Start, ritz: Ritz, order: Indices) -> Float64Array:
        """Where an eigenvalue may hide of which a start may have held next to nothing."""
        values = ritz.values[order[: self.request.wanted.k]]
        margin = max(SETTLED * self.tolerance.of_largest, start.overtaking) * ritz.scale
        places = self.request.wanted.hiding_places(values, np.full(len(values), margin))
        return self._not_excluded(places, ritz, start.weight, start.odds)

    def _missed(self, ritz: Ritz, order: Indices) -> Float64Array:
        """Where an eigenvalue may hide from a search, further out than the tolerance."""
        values = ritz.values[order[: self.request.wanted.k]]
        places = self.request.wanted.edges(values, self._allowed(ritz, order))
        return self._not_excluded(places, ritz, 1.0, _RARE)

    def _not_excluded(
        self, places: Float64Array, ritz: Ritz, weight: float, odds: float
    ) -> Float64Array:
        needed = needed_growth(self.op.shape[0], weight, odds)
        grown = np.asarray([self.state.log_growth(float(mu), ritz) for mu in places])
        return places[grown < needed]

    def _note(self, ritz: Ritz, residuals: Float64Array, allowed: Float64Array) -> None:
        k, tol = self.request.wanted.k, self.tolerance.of_largest
        enough = len(residuals) == k
        # In units of the tolerance, so that the solve ends where all are within theirs.
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.where(residuals > 0, residuals / allowed, 0.0)
        progress = Progress(
            matvecs=self.solve_matvecs,
            converged=int(np.sum(residuals <= allowed)) if enough else 0,
            k=k,
            residual=tol * float(parts.max()) if enough else float("inf"),
            tol=tol,
            max_matvecs=self.plan.max_matvecs,
            restarts=self.state.restarts,
            largest=ritz.scale,
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.request.callback is not None:
            self.request.callback(progress)

    def _kept(self, ritz: Ritz, order: Indices) -> Indices:
        """Which Ritz pairs survive a restart: the wanted, and 40 % of the room beyond them.

        Of the others a block at least is not settled: what is on its way to displace a wanted pair
        would start anew at every restart if settled pairs held its place. Of blocks of several
        vectors a search keeps two, or they take turns.
        """
        k, m, b = self.request.wanted.k, len(order), self.plan.block_size
        room = self.plan.max_basis - 2 * b
        extra = max(int(0.4 * (m - k)), 2 * b if b > 1 and self._searching else 0)
        count = max(min(k + extra, room, m), min(k, m))
        kept, dropped = order[:count], order[count:]
        allowed = self._allowed(ritz, order)
        rising = ritz.residuals > SETTLED * allowed.min()
        missing = min(b, count - k) - int(np.sum(rising[kept[k:]]))
        late = dropped[rising[dropped]][: max(missing, 0)]
        return np.concatenate([kept[: count - len(late)], late])

    def _settle(self, ritz: Ritz, order: Indices, unknown: float) -> Pairs:
        """Turn the first rows of the basis into Ritz vectors, the wanted first."""
        pairs = self._pairs(ritz, order, unknown)
        self.state.restart(ritz, self._kept(ritz, order))
        self.state.restarts -= 1  # the basis was not full
        self._found, self._lost = unmeasured(pairs), False
        return pairs

    def _pairs(self, ritz: Ritz, order: Indices, unknown: float) -> Pairs:
        wanted = self.request.wanted
        chosen, allowed = order[: wanted.k], self._allowed(ritz, order)
        return Pairs(
            ritz.values[chosen],
            ritz.residuals[chosen],
            ritz.values[order[wanted.k :]],
            wanted.doubtful(ritz.values, ritz.residuals, order, allowed),
            ritz.scale,
            unknown,
        )

    def _certify(self, pairs: Pairs) -> Certificate:
        """Measure the residuals; after Ctrl-C only of the pairs that seem to have converged."""
        before, measured = self.state.matvecs, np.ones(len(pairs.values), bool)
        if self.interrupted:
            measured = pairs.predicted <= self.tolerance.allowed(
                pairs.values, pairs.predicted, pairs.scale
            )
        _, certificate = self._found = unmeasured(pairs)
        try:
            with self.clock.part("verification"):
                if self.request.certify == "sampled" and measured.all():
                    certificate = measure_sampled(
                        self.state, pairs.values, pairs.predicted, pairs.scale
                    )
                else:
                    measure(self.state, certificate, measured, pairs.scale, pairs.unknown)
        finally:
            self.verification += self.state.matvecs - before
        self._found = pairs, certificate
        return certificate

    def _search(self, pairs: Pairs, certificate: Certificate) -> tuple[Pairs, Certificate, bool]:
        """Look for missed pairs in the complement of those found, until a search finds none.

        A pair that the solve missed has no component in its Krylov space. A random block orthogonal
        to the found pairs has one, whatever the multiplicity; it goes on until an eigenvalue
        further out than the wanted ones would have shown.
        """
        k = self.request.wanted.k
        self._searching = True
        while not (self._exhausted or self.interrupted):
            restarts = self.state.restarts
            # From here on E does not hold the residuals of the rows that stay.
            unknown = float(np.linalg.norm(certificate.residuals))
            self.state.drop(k)
            self.state.start(self.state.random_block())
            ritz, order = self._iterate(0.5, 0.0, self._missed)
            values = ritz.values[order[:k]]
            allowed = self._allowed(ritz, order)
            doubtful = self.request.wanted.doubtful(ritz.values, ritz.residuals, order, allowed)
            finished = not (doubtful | self._cut_short).any()
            change = np.abs(np.sort(values) - np.sort(pairs.values))
            unchanged = bool(np.all(change <= 0.1 * np.sort(allowed)[0]))
            if unchanged and self.state.restarts == restarts:
                return pairs, certificate, finished  # the verified rows were not touched
            pairs = self._settle(ritz, order, unknown)
            certificate = self._certify(pairs)
            self._judge(certificate, pairs.scale)
            if unchanged:
                return pairs, certificate, finished
        return pairs, certificate, False

    def _report(self, pairs: Pairs, certificate: Certificate, complete: bool | None) -> EigenResult:
        state = self.state
        values, residuals = certificate.values, certificate.residuals
        allowed = self._certified(certificate, pairs.scale)
        converged = (residuals <= allowed) & ~pairs.doubtful
        known = np.where(np.isnan(residuals), pairs.predicted, residuals)
        errors = estimate_errors(values, known, pairs.others)
        with self.clock.part("verification"):
            loss = math.nan if self._lost else orthogonality(state, len(values))
        state.share_out_seconds(self.solve_matvecs)
        self._warn(converged)
        wanted = self.request.return_eigenvectors and not self._lost
        return EigenResult.measured(
            values,
            residuals,
            lambda down: self._vectors(down) if wanted else None,
            estimated_errors=errors,
            converged=converged,
            complete=complete,
            orthogonality=loss,
            noise=max(self.noise, state.asymmetry),
            tol_effective=self.tolerance.parts(values, residuals, pairs.scale),
            num_matvecs=self.solve_matvecs,
            num_verification=self.verification,
            num_restarts=state.restarts,
            block_size=self.plan.block_size,
            seed=self.request.seed,
            history=self.history,
            clock=self.clock,
            interrupted=bool(self.interrupted) or self._failed,
        )

    def _vectors(self, order: IntArray) -> Any:
        """The rows `order` as vectors of the operator. The basis is gone before they are wide."""
        rows = programs.take(self.clock, self.state.basis, order.astype(np.int32))
        jax.block_until_ready(rows)
        self.state.basis.delete()
        return programs.deliver(self.clock, self.op, rows)

    def _warn(self, converged: Any) -> None:
        if self.interrupted or self._failed:
            return
        self.tolerance.warn_if_raised(self.op)
        if not converged.all():
            tol = self.tolerance.of_largest
            remedy = f"raise max_matvecs ({self.plan.max_matvecs}) or tol ({tol:.3g})"
            found = int(converged.sum())
            warn_unconverged(found, self.request.wanted.k, self.solve_matvecs, remedy)
