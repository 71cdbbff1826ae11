"""The means and weights that a loss returns, batch by batch, and the mean over all."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import shares
from curvax.warnings import warn

_PAIR = (
    "A pair that a loss returns is (mean, weight): the mean, and the number of labels, or the sum "
    "of their weights, that it is over"
)


def check_values(means: Array, weights: Array, positions: Sequence[int] | Array) -> None:
    """Refuse weights that no mean has, and a loss that is not finite.

    Args:
        means: of the microbatches of a stack.
        weights: theirs.
        positions: the batches that they came from.

    Raises:
        ValueError: a weight that is negative, infinite or NaN.
        FloatingPointError: a loss that is infinite or NaN.
    """
    if isinstance(means, jax.core.Tracer):
        return
    given = np.asarray(weights)
    bad = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
    if bad.size:
        raise ValueError(
            "the weight that the loss returns must be finite and not negative, got "
            f"{given[bad[0]]} on batch {positions[bad[0]]}. {_PAIR}. Weights of labels must not be "
            "negative either, and their sum must fit in the dtype: scale them"
        )
    bad = np.flatnonzero(~np.isfinite(np.asarray(means)) & (given > 0))
    if bad.size:
        raise FloatingPointError(
            f"the loss is {np.asarray(means)[bad[0]]} on batch {positions[bad[0]]}: check the "
            "parameters, the data (a label out of range, a negative weight, or no label to count?) "
            "and the loss"
        )


def weighted_mean(means: Sequence[Array], weights: Sequence[Array]) -> tuple[Array, Array]:
    """The mean over all microbatches, in stacks, and the sum of the weights.

    Raises:
        ValueError: the sum is not positive and finite.
    """
    # As one array: XLA compiles each operation anew for every length.
    own, mean = (jnp.concatenate(parts) for parts in (weights, means))
    total = jnp.sum(own)
    if not isinstance(total, jax.core.Tracer) and not 0 < float(total) < float("inf"):
        raise ValueError(
            "the weights that loss returned must have a positive sum, which fits in "
            f"{total.dtype}, got {total}. {_PAIR}"
        )
    # The shares first: a large weight times a mean may leave the range of float32.
    return jnp.sum(jnp.where(own > 0, shares(own, total) * mean, 0)), total


def warn_of_metric() -> None:
    """Warn of a weight that the parameters decide."""
    warn(
        "the weight that the loss returns is computed from the parameters, as an accuracy or "
        f"another metric would be, and batches are averaged by it. {_PAIR}. Return the mean alone, "
        "or with what it is over",
        UserWarning,
    )


def warn_of_zeros(weights: Sequence[Array], positions: Sequence[Sequence[int] | Array]) -> None:
    """Warn of whole batches that count nothing; microbatches of a batch may."""
    if any(isinstance(own, jax.core.Tracer) for own in weights):
        return
    flat = np.concatenate([np.asarray(own) for own in weights])
    places = np.concatenate([np.asarray(own) for own in positions])
    counted = set(places[flat > 0].tolist())
    empty = [place for place in np.unique(places).tolist() if place not in counted]
    if empty:
        listed = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        warn(
            f"the weight that the loss returns is 0 on {len(empty)} of {len(set(places.tolist()))} "
            f"batches (batch {listed}), which then count nothing. {_PAIR}: 0 is right only where "
            "all labels are masked",
            UserWarning,
        )
