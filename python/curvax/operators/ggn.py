"""The generalised Gauss-Newton matrix, by products with an exact Jacobian and its transpose."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from curvax.filters import Filter
from curvax.operators.curvature import Curvature, assemble
from curvax.operators.linear_map import ModelMap
from curvax.operators.twice import check_linear, first_possible, pull_back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GaussNewton(Curvature):
    """The Gauss-Newton matrix of the weighted mean loss over all batches, at fixed parameters."""


def ggn(
    forward: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    *,
    microbatch_size: int | None = None,
    num_batches: int | None = None,
    where: Filter | None = None,
    linearize: bool | Literal["auto"] = "auto",
) -> GaussNewton:
    """The generalised Gauss-Newton matrix `Jᵀ H J` of a model and a loss, as an operator.

    `J` is the Jacobian of the outputs in the parameters and `H` the Hessian of the loss in the
    outputs, both exact. The matrix is positive semidefinite where the loss is convex in the outputs
    (Schraudolph 2002, "Fast curvature matrix-vector products"). A product costs 1.33 gradients'
    worth of floating-point operations where the residuals are kept, else 1.67.

    Args:
        forward: `forward(params, batch)` returns the outputs, a pytree of real floating arrays.
        loss: `loss(outputs, batch)` returns a scalar mean or a pair `(mean, weight)`, as for
            `hessian`. If it has a method `hessian_product(outputs, batch, u)`, as the classes in
            `curvax.losses` have, that is `H u`; else JAX differentiates the loss twice. To have
            no logits, let `forward` return `(hidden, head)` and take `losses.LinearCrossEntropy`,
            whose `H` is that of the logits. `losses.linear_cross_entropy` in a function of one's
            own is not convex in hidden states and head together, and gives another matrix.
        params: as for `hessian`.
        batches: as for `hessian`.
        microbatch_size: as for `hessian`.
        num_batches: as for `hessian`.
        where: as for `hessian`.
        linearize: as for `hessian`.

    Returns:
        The operator.

    Raises:
        TypeError: as for `hessian`, or `forward` is not callable or returns an array that is not
            real and floating, or `hessian_product` returns another structure.
        ValueError: as for `hessian`.
        FloatingPointError: the loss is not finite.
    """
    for name, function in (("forward", forward), ("loss", loss)):
        if not callable(function):
            arguments = "params" if name == "forward" else "outputs"
            raise TypeError(
                f"{name} must be callable as {name}({arguments}, batch), got {function!r}"
            )
    make_map = functools.partial(GaussNewtonMap, forward=forward, loss=loss)
    return assemble(
        GaussNewton, make_map, params, batches, microbatch_size, num_batches, where, linearize
    )


@dataclasses.dataclass(frozen=True)
class GaussNewtonMap(ModelMap):
    """`Jᵀ H J` of one microbatch."""

    forward: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Any]

    def _outputs(self, selected: Sequence[Array], leaves: Sequence[Array], batch: Any) -> Any:
        outputs = self.forward(self.params(selected, leaves), batch)
        for leaf in jax.tree.leaves(outputs):
            if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
                kind = getattr(leaf, "dtype", type(leaf).__name__)
                raise TypeError(
                    f"forward must return real floating arrays, got {kind}: return what else the "
                    "loss needs as part of the batch"
                )
        return outputs

    def evaluate(self, leaves: Sequence[Array], batch: Any) -> tuple[Array, Array]:
        """See `ModelMap`."""
        outputs = self._outputs(self.taken(leaves), leaves, batch)
        return self.checked(self.loss(outputs, batch), batch)[1]

    def linear_map(self, leaves: Sequence[Array], batch: Any) -> tuple[tuple[Array, Array], Any]:
        """See `ModelMap`."""
        outputs, push, pull = self._jacobian(leaves, batch)
        aux = self.checked(self.loss(outputs, batch), batch)[1]
        return aux, Partial(_chain, push, self._curvature(outputs, batch), pull)

    def product(self, leaves: Sequence[Array], batch: Any, tangents: list[Array]) -> list[Array]:
        """See `ModelMap`."""
        return self.linear_map(leaves, batch)[1](tangents)

    def _jacobian(self, leaves: Sequence[Array], batch: Any) -> Any:
        """The outputs, `J` and its transpose; both maps are pytrees."""
        taken = self.taken(leaves)

        def outputs_of(selected: Sequence[Array]) -> Any:
            return self._outputs(selected, leaves, batch)

        def forward_mode() -> Any:
            outputs, push = jax.linearize(outputs_of, taken)
            check_linear(push, taken)
            return outputs, push, Partial(_transpose, push, taken)

        def reverse_mode() -> Any:
            # Of the transpose, which is linear in the cotangents, the transpose.
            outputs, pull = jax.vjp(outputs_of, taken)
            push = Partial(_transpose_of_vjp, pull, outputs)
            check_linear(push, taken)
            return outputs, push, Partial(pull_back, pull)

        ways = (forward_mode, reverse_mode)
        return first_possible("the model", outputs_of, (taken,), ways)

    def _curvature(self, outputs: Any, batch: Any) -> Any:
        """`H`, as a pytree."""
        if hasattr(self.loss, "hessian_product"):
            own = Partial(_own_product, Partial(self.loss.hessian_product), outputs, batch)
            jax.eval_shape(own, outputs)  # refused here rather than at the first product
            return own

        def mean(outputs: Any) -> Array:
            return self.checked(self.loss(outputs, batch), batch)[0]

        def forward_over_reverse() -> Any:
            linear = jax.linearize(jax.grad(mean), outputs)[1]
            check_linear(linear, outputs)
            return linear

        def reverse_over_reverse() -> Any:
            return Partial(pull_back, jax.vjp(jax.grad(mean), outputs)[1])

        ways = (forward_over_reverse, reverse_over_reverse)
        return first_possible("the loss", mean, (outputs,), ways)


def _chain(push: Any, curvature: Any, pull: Any, tangents: list[Array]) -> list[Array]:
    return pull(curvature(push(tangents)))


def _transpose(push: Any, like: Any, cotangents: Any) -> Any:
    return jax.linear_transpose(push, like)(cotangents)[0]


def _transpose_of_vjp(pull: Any, like: Any, tangents: Any) -> Any:
    return jax.vjp(lambda c: pull(c)[0], like)[1](tangents)[0]


def _own_product(product: Any, outputs: Any, batch: Any, u: Any) -> Any:
    result = product(outputs, batch, u)
    wanted, got = (
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (u, result)
    )
    if wanted != got:
        raise TypeError(
            "hessian_product must return the structure, shapes and dtypes of the outputs: expected "
            f"{wanted}, got {got}"
        )
    return result
