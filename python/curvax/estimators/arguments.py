"""Arguments that the estimators share, checked, and the intervals they report."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from curvax.checks import check_number
from curvax.krylov.sizes import check_block_size
from curvax.program import default_platform

# With fewer samples no interval is given. Those of ±1 can all be equal though the operator is far
# from diagonal: of one pair of entries beside the diagonal, in 2 of 2^s runs.
FEWEST_FOR_INTERVAL = 8

# A requested standard error is not believed to be reached on fewer samples than this.
FEWEST_SAMPLES = 10

# Roundings that an interval allows for, in units of eps times the operator's Frobenius norm: the
# errors of the products, of signs that vary, summed over a probe.
ROUNDINGS = 8


def check_until(until: object) -> float | None:
    """A requested standard error, or None.

    Raises:
        TypeError: not a number.
        ValueError: not positive, or not finite.
    """
    if until is None:
        return None
    return check_number("until, a standard error,", until, positive=True)


def check_block(asked: object, n: int) -> int:
    """Vectors per product.

    By default 1 on a CPU, where a larger block takes memory and saves little or no time, else 4.

    Raises:
        TypeError: neither an integer nor a string.
        ValueError: another string than `"auto"`, not positive, or too large.
    """
    block = check_block_size(asked, n, "auto")
    return min(n, 1 if default_platform() == "cpu" else 4) if isinstance(block, str) else block


def mean_stderr(samples: Sequence[float]) -> tuple[float, float]:
    """The mean of independent samples and its standard error, infinite for a single one."""
    values = np.asarray(samples, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.inf
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def interval(
    estimate: float, stderr: float, samples: int, shared: bool, rounding: float, stopped: bool
) -> tuple[float, float]:
    """The 95 % interval by Student's t, and the roundings.

    Args:
        estimate: its middle.
        stderr: may be infinite, or 0 where there is no error but rounding.
        samples: that the standard error is from; 0 where there are none. NaN of too few.
        shared: whether they share a sketch: s of them are then worth s/2 degrees of freedom, where
            independent ones are worth s − 1.
        rounding: the allowance for roundings.
        stopped: whether the standard error decided when to stop. It does so sooner where it is too
            small: the interval is then one of 97.5 %, of which 95 % is left.
    """
    if math.isinf(stderr):
        return -math.inf, math.inf
    if 0 < samples < FEWEST_FOR_INTERVAL:
        return math.nan, math.nan
    freedom = samples / 2 if shared else samples - 1
    quantile = float(stdtrit(freedom, 0.9875 if stopped else 0.975)) if samples else 0.0
    half = quantile * stderr + rounding
    return estimate - half, estimate + half


def missing_interval(interval: tuple[float, float], samples: int, products: int) -> str:
    """Why there is no interval; empty if there is.

    Args:
        interval: as `interval` gives it.
        samples: that there are.
        products: that each of them takes.
    """
    if all(math.isfinite(end) for end in interval):
        return ""
    if not samples:
        return "the sum is not complete"
    return too_few_samples(samples, products)


def too_few_samples(samples: int, products: int) -> str:
    """That they are, and how many are needed, where each takes so many products."""
    return (
        f"{samples} {'sample is' if samples == 1 else 'samples are'} too few to know the error by: "
        f"{FEWEST_FOR_INTERVAL} are needed, of {products * FEWEST_FOR_INTERVAL} products"
    )
