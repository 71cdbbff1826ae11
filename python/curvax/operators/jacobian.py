"""Matrices `Jᵀ M J`: a matrix `M` on a model's outputs, between the Jacobian and its transpose."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from curvax.checks import shown
from curvax.operators.custom_vjp import check_linear, first_possible, pull_back
from curvax.operators.microbatch import LinearMap
from curvax.typing import Batch, LossValue, Params, PyTree

Function = Callable[[PyTree, Batch], LossValue]


def check_callables(forward: object, loss: object) -> tuple[Function, Function]:
    """A model and a loss, if both can be called.

    Raises:
        TypeError: as said.
    """
    for name, function in (("forward", forward), ("loss", loss)):
        if not callable(function):
            arguments = "params" if name == "forward" else "outputs"
            raise TypeError(
                f"{name} must be callable as {name}({arguments}, batch), got {shown(function)}"
            )
    return forward, loss  # type: ignore[return-value]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sandwich:
    """`Jᵀ M J`, by three pytrees that can be called.

    Attributes:
        push: `J`, from parameters to outputs.
        inner: `M`, on the outputs.
        pull: `Jᵀ`.
    """

    push: PyTree
    inner: PyTree
    pull: PyTree

    def __call__(self, tangents: list[Array]) -> list[Array]:
        """The product, as leaves."""
        return list(self.pull(self.inner(self.push(tangents))))


@dataclasses.dataclass(frozen=True)
class SandwichMap(LinearMap):
    """`Jᵀ M J` of one microbatch, with the exact Jacobian `J` of the outputs in the parameters."""

    forward: Callable[[Params, Batch], PyTree]
    loss: Callable[[PyTree, Batch], LossValue]

    @abc.abstractmethod
    def inner(self, outputs: PyTree, batch: Batch) -> PyTree:
        """`M`, as a pytree that can be called."""

    def data(self, batch: Batch) -> PyTree:
        """The part of a microbatch that the model and the loss are given."""
        return batch

    def evaluate(self, leaves: Sequence[Array], batch: Batch) -> tuple[Array, Array]:
        """See `MicrobatchMap`."""
        batch = self.data(batch)
        outputs = self._outputs(self.taken(leaves), leaves, batch)
        return self.checked(self.loss(outputs, batch), batch)[1]

    def linear_map(
        self, leaves: Sequence[Array], batch: Batch
    ) -> tuple[tuple[Array, Array], Sandwich]:
        """See `LinearMap`."""
        data = self.data(batch)
        outputs, push, pull = self.jacobian(leaves, data)
        aux = self.checked(self.loss(outputs, data), data)[1]
        return aux, Sandwich(push, self.inner(outputs, batch), pull)

    def _outputs(self, selected: Sequence[Array], leaves: Sequence[Array], batch: Batch) -> PyTree:
        outputs = self.forward(self.params(selected, leaves), batch)
        for leaf in jax.tree.leaves(outputs):
            if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
                kind = getattr(leaf, "dtype", type(leaf).__name__)
                raise TypeError(
                    f"forward must return real floating arrays, got {kind}: return what else the "
                    "loss needs as part of the batch"
                )
        return outputs

    def jacobian(self, leaves: Sequence[Array], batch: Batch) -> PyTree:
        """The outputs, `J` and its transpose; both maps are pytrees."""
        taken = self.taken(leaves)

        @self.whole
        def outputs_of(selected: Sequence[Array]) -> PyTree:
            return self._outputs(selected, leaves, batch)

        def forward_mode() -> PyTree:
            outputs, push = jax.linearize(outputs_of, taken)
            check_linear(push, taken)
            return outputs, push, Partial(_transpose, push, taken)

        def reverse_mode() -> PyTree:
            # Of the transpose, which is linear in the cotangents, the transpose.
            outputs, pull = jax.vjp(outputs_of, taken)
            push = Partial(_transpose_of_vjp, pull, outputs)
            check_linear(push, taken)
            return outputs, push, Partial(pull_back, pull)

        ways = (forward_mode, reverse_mode)
        return first_possible("the model", outputs_of, (taken,), ways)


def check_outputs(method: str, result: PyTree, outputs: PyTree) -> PyTree:
    """What a loss's own method returned, if it looks like the outputs.

    Raises:
        TypeError: it does not.
    """
    wanted, got = (
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (outputs, result)
    )
    if wanted != got:
        raise TypeError(
            f"{method} must return the structure, shapes and dtypes of the outputs: expected "
            f"{shown(wanted)}, got {shown(got)}"
        )
    return result


def _transpose(push: PyTree, like: PyTree, cotangents: PyTree) -> PyTree:
    return jax.linear_transpose(push, like)(cotangents)[0]


def _transpose_of_vjp(pull: PyTree, like: PyTree, tangents: PyTree) -> PyTree:
    return jax.vjp(lambda c: pull(c)[0], like)[1](tangents)[0]
