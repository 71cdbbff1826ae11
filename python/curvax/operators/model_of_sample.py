"""A model and a loss on one sample of a batch, where its samples do not mix."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from curvax.losses.objects import LinearCrossEntropy, MeanSquaredError, SoftmaxCrossEntropy
from curvax.operators.batches import leading_size
from curvax.operators.closure import Closed, close
from curvax.operators.jacobian import SandwichMap
from curvax.operators.sample_rules import Sample, UnfollowedError, Value
from curvax.operators.samples import OneByOneProgram, evaluated
from curvax.typing import Batch, LossValue, PyTree, PyTreeDef

_log = logging.getLogger("curvax")

# Losses whose matrix is known to be a sum over samples, and what they take of the batch.
_GETTERS: dict[type, tuple[str, ...]] = {
    SoftmaxCrossEntropy: ("labels", "weights"),
    LinearCrossEntropy: ("labels", "weights"),
    MeanSquaredError: ("targets", "weights"),
}


@functools.cache
def tell_unknown(what: str) -> None:
    """Say, once of each, what keeps the gradients of samples from being kept."""
    _log.info(
        "fisher keeps no gradient per sample, though they would be shorter than the activations: "
        "whether the samples of a batch mix is not known, for %s. If they do not, "
        "microbatch_size=1 keeps the gradients, and products are faster",
        what,
    )


@dataclasses.dataclass(frozen=True)
class ModelOfSample:
    """A model and a loss, to be evaluated on one sample of a batch after the other.

    Attributes:
        count: of the samples.
        forward: from the data to the outputs and the Jacobian in the parameters, a pytree.
        push: from that Jacobian and tangents of the parameters to those of the outputs.
        outputs: their structure.
        carried: of each output, whether it has the samples on its leading axis.
        loss: the loss.
        getters: what it takes of the data, by name.
        taken: the parameters.
    """

    count: int
    forward: OneByOneProgram
    push: Closed
    outputs: PyTreeDef
    carried: tuple[bool, ...]
    loss: Callable[[PyTree, Batch], LossValue]
    getters: dict[str, OneByOneProgram]
    taken: list[Array]

    @classmethod
    def of(cls, own: SandwichMap, leaves: Sequence[Array], data: Batch) -> "ModelOfSample":
        """That of a map, on data of several samples.

        Raises:
            UnfollowedError: whether its matrix is a sum over samples is not known.
        """
        names = _GETTERS.get(type(own.loss), ())
        if not names and hasattr(own.loss, "fisher_product"):
            raise UnfollowedError("the loss's own method fisher_product")
        count, taken = leading_size(data), own.taken(leaves)
        assert count is not None
        shared = [None if leaf.ndim else leaf for leaf in jax.tree.leaves(data)]
        forward = own.traced(lambda *args: own.jacobian(*args)[:2], leaves, data)
        avals: list[PyTree] = [var.aval for var in forward.traced.jaxpr.outvars]
        outputs, jacobian = jax.tree.unflatten(forward.traced.out_tree, avals)
        carried = [leaf.ndim > 0 for leaf in jax.tree.leaves(outputs)]
        if isinstance(own.loss, LinearCrossEntropy):  # whose head has an axis of its own
            carried[1:] = [False] * (len(carried) - 1)
        getters = {name: close(getattr(own.loss, name), data) for name in names}
        return cls(
            count,
            OneByOneProgram.of(forward, [*leaves, *shared]),
            own.traced(lambda jacobian, tangents: jacobian(tangents), jacobian, taken),
            jax.tree.structure(outputs),
            tuple(carried),
            own.loss,
            {name: OneByOneProgram.of(one, shared) for name, one in getters.items()},
            taken,
        )

    def __call__(
        self, sample: Sample, data: Batch
    ) -> tuple[PyTree, Callable[[PyTree], list[Array]], Callable[[PyTree, Batch], LossValue]]:
        """The outputs, the transposed Jacobian, and the loss of a sample, whose data these are.

        Raises:
            MixedError: the samples mix; the message names the primitive.
            UnfollowedError: they may; the message says where.
        """
        own = [Value(leaf, 0) for leaf in jax.tree.leaves(data) if leaf.ndim]
        results = self.forward(sample, own)
        outputs, jacobian = results[: len(self.carried)], results[len(self.carried) :]

        def push(tangents: list[Array]) -> PyTree:
            given = [*jacobian, *map(Value, tangents)]
            return self._outputs(sample, evaluated(sample, self.push, given))

        transpose = jax.linear_transpose(push, self.taken)
        taken = {name: _of_batch(sample, get(sample, own)) for name, get in self.getters.items()}
        given = {name: functools.partial(_constant, value) for name, value in taken.items()}
        # The labels of this sample, in whatever order the whole batch's are taken from it.
        loss: Any = dataclasses.replace(self.loss, **given) if given else self.loss  # type: ignore[type-var]
        return self._outputs(sample, outputs), lambda c: list(transpose(c)[0]), loss

    def _outputs(self, sample: Sample, values: Sequence[Value]) -> PyTree:
        """The outputs, or their tangents, of one sample."""
        arrays = []
        for value, carried in zip(values, self.carried, strict=True):
            if not carried and value.axis is not None:
                raise UnfollowedError("an output that all samples share")
            arrays.append(_of_batch(sample, [value]) if carried else value.array)
        return jax.tree.unflatten(self.outputs, arrays)


def _of_batch(sample: Sample, values: Sequence[Value]) -> Array | None:
    """A sample's part, of length 1, of an array with the samples on its leading axis."""
    if not values:
        return None
    (value,) = values
    if value.axis is None and not np.ndim(value.array):
        return value.array
    part = sample.part(value, 0).array
    if part.shape[0] != 1:
        raise UnfollowedError("an array with more rows than samples")
    return part


def _constant(value: Array | None, batch: Batch) -> Array | None:
    return value
