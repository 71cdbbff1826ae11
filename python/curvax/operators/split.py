"""Whether the microbatches that a function makes of a batch add up to it."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax import Array

from curvax.operators.batches import Numbered
from curvax.operators.closure import Closed
from curvax.operators.microbatch import MicrobatchMap
from curvax.operators.weights import weighted_mean
from curvax.program import as_arguments, jit, untracked_settings
from curvax.typing import Batch, PyTree

# What a mean of another order of sums, in 16 bits too, may differ by, relative.
_SAME = 1e-3


def check_split(
    model: MicrobatchMap,
    leaves: tuple[Array, ...],
    batches: Sequence[Batch],
    loss: Array,
    numbered: bool,
) -> None:
    """Compare the mean over microbatches with that over the batches that they were made of.

    Raises:
        ValueError: they differ.
    """
    if isinstance(loss, jax.core.Tracer):
        return
    whole = dataclasses.replace(model, several=len(batches) > 1)
    values = []
    for batch in batches:
        given = Numbered(batch, None) if numbered else batch
        closed = whole.traced(whole.evaluate, leaves, given)
        values.append(_evaluate(untracked_settings(), *as_arguments((closed, leaves, given))))
    expected, _ = weighted_mean(*([v[i][None] for v in values] for i in (0, 1)))
    scale = max(float(np.abs(v[0])) for v in values)
    if not abs(float(loss) - float(expected)) <= _SAME * scale:
        raise ValueError(
            f"microbatch_size, a function, splits batches of loss {float(expected):.6g} into "
            f"microbatches of the weighted mean {float(loss):.6g}, which must be the same. Let the "
            "loss return (mean, weight), with the weight that each microbatch has in the whole "
            "(equal for equal parts of each array), or carry the samples' own shares in the batch"
        )


@functools.partial(jit, static=0)
def _evaluate(settings: Hashable, value: Closed, leaves: PyTree, batch: Batch) -> PyTree:
    return value(leaves, batch)
