"""Sampling of an operator: its settings, its budget, its progress."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from curvax.estimators.arguments import FEWEST_SAMPLES
from curvax.estimators.deflation import Deflation
from curvax.estimators.products import Products
from curvax.interrupt import InterruptFlag
from curvax.krylov.scaling import exponent_of
from curvax.operators.base import Operator
from curvax.program import Clock
from curvax.results import TraceProgress
from curvax.warnings import warn


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that steers an estimate.

    Attributes:
        planned: the products asked for.
        limit: the most products; more than planned where a standard error is asked for.
        distribution: of the probes.
        until: the standard error asked for, or None.
        seed: of the probes.
        block: vectors per product.
        callback: called after each block, or None.
    """

    planned: int
    limit: int
    distribution: str
    until: float | None
    seed: int
    block: int
    callback: Callable[[TraceProgress], Any] | None


class Estimate(NamedTuple):
    """What a method found of the trace.

    Attributes:
        method: its name.
        value: of the part that is not deflated.
        stderr: its standard error.
        samples: that it is from.
        size: the Frobenius norm of the operator, about, which roundings are relative to.
        noise: errors of the products that were measured.
    """

    method: str
    value: float
    stderr: float
    samples: Sequence[float]
    size: float
    noise: float = 0.0


class Sampling(Products):
    """Products on a budget, and the progress of what is estimated by them."""

    def __init__(
        self,
        op: Operator,
        settings: Settings,
        interrupted: InterruptFlag,
        clock: Clock,
        deflation: Deflation | None = None,
    ) -> None:
        super().__init__(op, settings.seed, settings.distribution, clock, deflation or Deflation())
        self.settings = settings
        self.interrupted = interrupted
        self.history: list[TraceProgress] = []

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return self.settings.limit - self.matvecs

    def note(self, estimate: float, stderr: float) -> None:
        """Record the state after a block of products, and call back."""
        progress = TraceProgress(
            matvecs=self.matvecs,
            estimate=self.deflation.value + estimate,
            stderr=stderr,
            max_matvecs=self.settings.limit,
            until=self.settings.until,
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.settings.callback is not None:
            self.settings.callback(progress)

    def reached(self, samples: int, stderr: float) -> bool:
        """Whether the standard error asked for is reached, on samples enough to believe it."""
        until = self.settings.until
        return until is not None and samples >= FEWEST_SAMPLES and stderr <= until

    def warn_if_above(self, stderr: float) -> None:
        """Warn if the standard error asked for was not reached."""
        until = self.settings.until
        if until is not None and not self.interrupted and stderr > until:
            unit = 0.5 ** exponent_of(self.op)
            warn(
                f"the standard error is {unit * stderr:.3g} after {self.matvecs} products, above "
                f"until={unit * until:.3g}: {_remedy(self.matvecs, stderr / until)}"
            )


def _remedy(matvecs: int, ratio: float) -> str:
    if not math.isfinite(ratio):
        return "raise max_matvecs"
    return (
        f"raise max_matvecs (to about {matvecs * ratio**2:.2g} if the error falls with the root of "
        "their number), or pass a solve's pairs as deflate="
    )
