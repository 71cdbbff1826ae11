"""Warnings, and the line of the user that they are issued at."""

import sys
import warnings


class ConvergenceWarning(UserWarning):
    """Not every wanted pair converged, or the tolerance had to be raised."""


class InterruptWarning(ConvergenceWarning):
    """Ctrl-C ended a computation, whose result holds what was known by then."""


def warn(message: str, category: type[Warning] = ConvergenceWarning) -> None:
    """Issue a warning at the line that called curvax."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("curvax."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_unconverged(converged: int, k: int, products: int, remedy: str) -> None:
    """Warn that only `converged` of `k` pairs converged after `products` products."""
    warn(f"{converged} of {k} pairs converged after {products} products: {remedy}")
