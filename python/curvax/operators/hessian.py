"""The Hessian of a loss, by forward-over-reverse products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, Unpack, overload

import jax
from jax import Array

from curvax.checks import shown
from curvax.filters import Filter, select
from curvax.operators.assembly import CurvatureOptions, assemble
from curvax.operators.batches import Microbatches
from curvax.operators.curvature import Curvature
from curvax.operators.custom_vjp import check_linear, checked_linear, first_possible, pull_back
from curvax.operators.finite_difference import DifferenceHessian, DifferenceMap, tuned
from curvax.operators.microbatch import LinearMap, LossMap
from curvax.operators.model import Model, accepts_model
from curvax.operators.precision import Precision, check_precision
from curvax.options import takes_options
from curvax.typing import Batch, Batches, LossValue, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Hessian(Curvature):
    """The Hessian of the weighted mean loss over all batches, at fixed parameters."""


@dataclasses.dataclass(frozen=True)
class HessianMap(LinearMap, LossMap):
    """The Hessian of `loss(params, batch)` with respect to the chosen leaves: its gradient's."""

    def linear_map(
        self, leaves: Sequence[Array], batch: Batch
    ) -> tuple[tuple[Array, Array], PyTree]:
        """See `LinearMap`."""
        gradient, taken = self.gradient(leaves, batch), self.taken(leaves)

        def forward_over_reverse() -> PyTree:
            _, linear, aux = jax.linearize(gradient, taken, has_aux=True)
            check_linear(linear, taken)
            return aux, linear

        def reverse_over_reverse() -> PyTree:
            # The Hessian is its own transpose.
            _, transposed, aux = jax.vjp(gradient, taken, has_aux=True)
            return aux, jax.tree_util.Partial(pull_back, transposed)

        ways = (forward_over_reverse, reverse_over_reverse)
        return first_possible("the loss", self.evaluate, (leaves, batch), ways)

    def product(self, leaves: Sequence[Array], batch: Batch, tangents: list[Array]) -> list[Array]:
        """See `LinearMap`."""
        gradient, taken = self.gradient(leaves, batch), self.taken(leaves)

        def forward_over_reverse() -> PyTree:
            def along(tangents: PyTree) -> PyTree:
                return jax.jvp(lambda s: gradient(s)[0], (taken,), (tangents,))[1]

            return checked_linear(along, tangents)

        def reverse_over_reverse() -> PyTree:
            return jax.vjp(gradient, taken, has_aux=True)[1](tangents)[0]

        ways = (forward_over_reverse, reverse_over_reverse)
        return first_possible("the loss", self.evaluate, (leaves, batch), ways)


class HessianOptions(CurvatureOptions, total=False):
    """Options of `hessian`."""

    method: Literal["autodiff", "finite_difference"]
    precision: Precision | None


@overload
def hessian(
    model: Model, /, batches: Batches, **options: Unpack[HessianOptions]
) -> Hessian | DifferenceHessian: ...
@overload
def hessian(
    loss: Callable[[Params, Batch], LossValue],
    params: Params,
    batches: Batches,
    **options: Unpack[HessianOptions],
) -> Hessian | DifferenceHessian: ...
@accepts_model(lambda model: (model.objective, model.params))
@takes_options()
def hessian(
    loss: Callable[[Params, Batch], LossValue] | Model,
    params: Params,
    batches: Batches,
    *,
    microbatch_size: Microbatches = None,
    num_batches: int | None = None,
    where: Filter | None = None,
    linearize: bool | Literal["auto"] = "auto",
    method: Literal["autodiff", "finite_difference"] = "autodiff",
    precision: Precision | None = None,
) -> Hessian | DifferenceHessian:
    """The Hessian of a loss with respect to parameters, as an operator.

    The primal half of a Hessian-vector product is the same in every product at fixed parameters.
    It is computed once and its residuals are kept, where memory allows; a product then costs 2
    gradients' worth of floating-point operations, instead of 3 (forward over reverse,
    Pearlmutter 1994).

    Of a `Model`: `hessian(model, batches, ...)`, with the same options.

    Args:
        loss: a `Model`, which has its own `params`; or a function. `loss(params, batch)` returns a
            scalar mean, weighted then by the length of the batch's leading axis, or a pair
            `(mean, weight)`, as for masked labels: the weight is the number of labels (or the sum
            of their weights) that the mean is over. It is no place for an accuracy or another
            metric, by which the batches would be averaged: one that is computed from the
            parameters, or is 0 on a whole batch, gets a warning. Twice differentiable by JAX.
        params: a pytree of real floating arrays. They are widened to float32 once (float64 stays).
            Leaves that `where` leaves out may be anything; the loss gets those that are not arrays
            as they are.
        batches: one batch (any pytree but a list), a list of batches, or a generator, read once.
            The operator is that of the weighted mean over all of them. `(x, y)` is one batch and
            `[x, y]` are two, of which two arrays of one length get a warning; `print(op)` says how
            many there are. Arrays in 64 bits are narrowed with JAX's 64-bit mode off; numbers that
            do not fit are refused.
        microbatch_size: split batches along their leading axis, to bound the memory of a product.
            The loss of a batch must be the mean of those of its parts, by the weights that it
            returns. Each size is compiled by itself: where batches have many lengths, what full
            microbatches leave is cut into powers of four. Or a function that gets a batch and
            returns its microbatches, as for arrays of different lengths; that their mean is that of
            the batch is then checked: return `(mean, weight)`, since a plain mean weighs by its
            length (and cannot if there are several).
        num_batches: how many batches to read, the first ones of a list, a loader or a generator;
            None for all.
        where: a parameter filter: `match_names(...)`, `match_regex(...)`, a predicate
            `(name, leaf) -> bool`, or a pytree of bools. The operator is then the diagonal block
            of the Hessian on the selected leaves; in its vectors the others are None.
        linearize: keep the residuals of the primal half: always, never, or (`"auto"`) for as many
            microbatches as fit in 40 % of the free memory; on a GPU, in what is left after a basis
            of 20 rows and the scratch of a product.
        method: `"autodiff"` is exact. `"finite_difference"` takes central differences of the
            gradient, for a loss that has no second derivative: two gradients per product, and an
            error that is measured (`relative_error` of the operator; about 1e-3 in float32), with
            a warning where it is large, as for parameters of very different sizes.
        precision: of the products of matrices in the loss and its derivatives: JAX's setting where
            this is called (None; on recent devices TF32 by default), `"highest"` for full float32,
            or `"bf16x3"` for three products in bfloat16 in place of each that has no batch axes,
            as those with weights have none, and full float32 for the others and for convolutions.
            A product for which the loss names a precision keeps that. `"bf16x3"` is refused on a
            CPU, where XLA would ignore it. What it costs shows in `noise` and `tol_effective` of a
            solve.

    Returns:
        The operator.

    Raises:
        TypeError: a selected parameter is not real and floating, the loss is not callable or does
            not return a real scalar, or it cannot be differentiated twice. A NumPy masked array.
        ValueError: no batch, an empty batch, a filter that selects nothing, no element in the
            selected parameters, parameters in float64 with JAX's 64-bit mode off, data that
            would not fit in the dtype that they are narrowed to, a loss that is not a scalar,
            weights that are negative, infinite or all zero, arrays of different leading lengths in
            a batch that is to be split by size, or weighted by its length, or microbatches that do
            not add up to their batch. An unknown `precision`, or `"bf16x3"` on a CPU or for finite
            differences.
        FloatingPointError: the loss is not finite, or its gradient so small that finite differences
            of it underflow.
    """
    if not callable(loss):
        order = "; the order is hessian(loss, params, batches)" if callable(params) else ""
        raise TypeError(f"loss must be callable as loss(params, batch), got {shown(loss)}{order}")
    if method not in ("autodiff", "finite_difference"):
        raise ValueError(f"method must be 'autodiff' or 'finite_difference', got {shown(method)}")
    check_precision(precision, method)
    put_together = functools.partial(
        assemble,
        params=params,
        batches=batches,
        microbatch_size=microbatch_size,
        num_batches=num_batches,
        where=where,
    )
    if method == "autodiff":
        make_map = functools.partial(HessianMap, loss=loss, precision=precision)
        return put_together(Hessian, make_map, linearize=linearize)
    if linearize is True:
        raise ValueError("finite differences have no linear half: linearize must not be True")
    differences = functools.partial(DifferenceMap, loss=loss, precision=precision)
    chosen = zip(jax.tree.leaves(params), select(params, where), strict=True)
    leaves = [leaf for leaf, taken in chosen if taken]
    return tuned(put_together(DifferenceHessian, differences, linearize=False), leaves)
