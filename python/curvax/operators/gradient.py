"""The gradient of a loss on one microbatch, and its linearisation: the Hessian."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from curvax.operators.curvature import Curvature
from curvax.operators.custom_vjp import check_linear, first_possible, pull_back
from curvax.operators.microbatch import ModelMap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Hessian(Curvature):
    """The Hessian of the weighted mean loss over all batches, at fixed parameters."""


@dataclasses.dataclass(frozen=True)
class GradientMap(ModelMap):
    """The gradient of `loss(params, batch)` with respect to the chosen leaves."""

    loss: Callable[[Any, Any], Any]

    def _mean(
        self, selected: Sequence[Array], leaves: Sequence[Array], batch: Any
    ) -> tuple[Array, tuple[Array, Array]]:
        return self.checked(self.loss(self.params(selected, leaves), batch), batch)

    def _gradient(self, leaves: Sequence[Array], batch: Any) -> Callable[..., Any]:
        def gradient(selected: Sequence[Array]) -> Any:
            return jax.grad(self._mean, has_aux=True)(selected, leaves, batch)

        return gradient

    def evaluate(self, leaves: Sequence[Array], batch: Any) -> tuple[Array, Array]:
        """See `ModelMap`."""
        return self._mean(self.taken(leaves), leaves, batch)[1]

    def linear_map(self, leaves: Sequence[Array], batch: Any) -> tuple[tuple[Array, Array], Any]:
        """See `ModelMap`."""
        gradient, taken = self._gradient(leaves, batch), self.taken(leaves)

        def forward_over_reverse() -> Any:
            _, linear, aux = jax.linearize(gradient, taken, has_aux=True)
            check_linear(linear, taken)
            return aux, linear

        def reverse_over_reverse() -> Any:
            # The Hessian is its own transpose.
            _, transposed, aux = jax.vjp(gradient, taken, has_aux=True)
            return aux, jax.tree_util.Partial(pull_back, transposed)

        ways = (forward_over_reverse, reverse_over_reverse)
        return first_possible("the loss", self.evaluate, (leaves, batch), ways)

    def product(self, leaves: Sequence[Array], batch: Any, tangents: list[Array]) -> list[Array]:
        """See `ModelMap`."""
        gradient, taken = self._gradient(leaves, batch), self.taken(leaves)

        def forward_over_reverse() -> Any:
            return jax.jvp(lambda s: gradient(s)[0], (taken,), (tangents,))[1]

        def reverse_over_reverse() -> Any:
            return jax.vjp(gradient, taken, has_aux=True)[1](tangents)[0]

        ways = (forward_over_reverse, reverse_over_reverse)
        return first_possible("the loss", self.evaluate, (leaves, batch), ways)
