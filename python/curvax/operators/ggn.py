"""The generalised Gauss-Newton matrix, by products with an exact Jacobian and its transpose."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, Unpack, overload

import jax
from jax import Array
from jax.tree_util import Partial

from curvax.filters import Filter
from curvax.operators.assembly import CurvatureOptions, assemble
from curvax.operators.batches import Microbatches
from curvax.operators.curvature import Curvature
from curvax.operators.custom_vjp import check_linear, first_possible, pull_back
from curvax.operators.jacobian import SandwichMap, check_callables, check_outputs
from curvax.operators.model import Model, accepts_model
from curvax.operators.precision import Precision, check_precision
from curvax.options import takes_options
from curvax.typing import Batch, Batches, LossValue, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GaussNewton(Curvature):
    """The Gauss-Newton matrix of the weighted mean loss over all batches, at fixed parameters."""


class GaussNewtonOptions(CurvatureOptions, total=False):
    """Options of `ggn`."""

    precision: Precision | None


@overload
def ggn(
    model: Model, /, batches: Batches, **options: Unpack[GaussNewtonOptions]
) -> GaussNewton: ...
@overload
def ggn(
    forward: Callable[[Params, Batch], PyTree],
    loss: Callable[[PyTree, Batch], LossValue],
    params: Params,
    batches: Batches,
    **options: Unpack[GaussNewtonOptions],
) -> GaussNewton: ...
@accepts_model(lambda model: (model.forward, model.loss, model.params))
@takes_options()
def ggn(
    forward: Callable[[Params, Batch], PyTree] | Model,
    loss: Callable[[PyTree, Batch], LossValue],
    params: Params,
    batches: Batches,
    *,
    microbatch_size: Microbatches = None,
    num_batches: int | None = None,
    where: Filter | None = None,
    linearize: bool | Literal["auto"] = "auto",
    precision: Precision | None = None,
) -> GaussNewton:
    """The generalised Gauss-Newton matrix `Jᵀ H J` of a model and a loss, as an operator.

    `J` is the Jacobian of the outputs in the parameters and `H` the Hessian of the loss in the
    outputs, both exact. The matrix is positive semidefinite where the loss is convex in the outputs
    (Schraudolph 2002, "Fast curvature matrix-vector products"). A product costs 1.33 gradients'
    worth of floating-point operations where the residuals are kept, else 1.67.

    Of a `Model`: `ggn(model, batches, ...)`, with the same options.

    Args:
        forward: a `Model`, which has its own `loss` and `params`; or a function.
            `forward(params, batch)` returns the outputs, a pytree of real floating arrays.
        loss: `loss(outputs, batch)` returns a scalar mean or a pair `(mean, weight)`, as for
            `hessian`, and no metric in place of the weight. If it has a method
            `hessian_product(outputs, batch, u)`, as the classes in `curvax.losses` have, that is
            `H u`; else JAX differentiates the loss twice. To have no logits, let `forward` return
            `(hidden, head)` and take `losses.LinearCrossEntropy`, whose `H` is that of the logits.
            `losses.linear_cross_entropy` in a function of one's own is not convex in hidden states
            and head together, and gives another matrix.
        params: as for `hessian`.
        batches: as for `hessian`.
        microbatch_size: as for `hessian`.
        num_batches: as for `hessian`.
        where: as for `hessian`.
        linearize: as for `hessian`.
        precision: as for `hessian`.

    Returns:
        The operator.

    Raises:
        TypeError: as for `hessian`, or `forward` is not callable or returns an array that is not
            real and floating, or `hessian_product` returns another structure.
        ValueError: as for `hessian`.
        FloatingPointError: the loss is not finite.
    """
    forward, loss = check_callables(forward, loss)
    check_precision(precision)
    make_map = functools.partial(GaussNewtonMap, forward=forward, loss=loss, precision=precision)
    return assemble(
        GaussNewton,
        make_map,
        params,
        batches,
        microbatch_size=microbatch_size,
        num_batches=num_batches,
        where=where,
        linearize=linearize,
    )


class GaussNewtonMap(SandwichMap):
    """`Jᵀ H J` of one microbatch."""

    def inner(self, outputs: PyTree, batch: Batch) -> PyTree:
        """See `SandwichMap`."""
        if hasattr(self.loss, "hessian_product"):
            own = Partial(_own_product, Partial(self.loss.hessian_product), outputs, batch)
            jax.eval_shape(own, outputs)  # refused here rather than at the first product
            return own

        def mean(outputs: PyTree) -> Array:
            return self.checked(self.loss(outputs, batch), batch)[0]

        def forward_over_reverse() -> PyTree:
            linear = jax.linearize(jax.grad(mean), outputs)[1]
            check_linear(linear, outputs)
            return linear

        def reverse_over_reverse() -> PyTree:
            return Partial(pull_back, jax.vjp(jax.grad(mean), outputs)[1])

        ways = (forward_over_reverse, reverse_over_reverse)
        return first_possible("the loss", mean, (outputs,), ways)


def _own_product(product: PyTree, outputs: PyTree, batch: Batch, u: PyTree) -> PyTree:
    return check_outputs("hessian_product", product(outputs, batch, u), u)
