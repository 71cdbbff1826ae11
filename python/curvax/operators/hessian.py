"""The Hessian of a loss, by forward-over-reverse products."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from curvax.filters import Filter
from curvax.operators.curvature import Curvature, assemble
from curvax.operators.gradient import GradientMap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Hessian(Curvature):
    """The Hessian of the weighted mean loss over all batches, at fixed parameters."""


def hessian(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    *,
    microbatch_size: int | None = None,
    where: Filter | None = None,
    linearize: bool | Literal["auto"] = "auto",
) -> Hessian:
    """The Hessian of a loss with respect to parameters, as an operator.

    The primal half of a Hessian-vector product is the same in every product at fixed parameters.
    It is computed once and its residuals are kept, where memory allows; a product then costs 2
    gradients' worth of floating-point operations, instead of 3 (forward over reverse,
    Pearlmutter 1994).

    Args:
        loss: `loss(params, batch)` returns a scalar mean, weighted then by the length of the
            batch's leading axis, or a pair `(mean, weight)`, as for masked labels. Twice
            differentiable by JAX.
        params: a pytree of real floating arrays. They are widened to float32 once (float64 stays).
            Leaves that `where` leaves out may be anything; the loss gets those that are not arrays
            as they are.
        batches: one batch (any pytree but a list), a list of batches, or a generator, read once.
            The operator is that of the weighted mean over all of them.
        microbatch_size: split batches along their leading axis, to bound the memory of a product.
        where: a parameter filter: `match_names(...)`, `match_regex(...)`, a predicate
            `(name, leaf) -> bool`, or a pytree of bools. The operator is then the diagonal block
            of the Hessian on the selected leaves; in its vectors the others are None.
        linearize: keep the residuals of the primal half: always, never, or (`"auto"`) for as many
            microbatches as fit in 40 % of the free memory.

    Returns:
        The operator.

    Raises:
        TypeError: a selected parameter is not real and floating, the loss is not callable or does
            not return a real scalar, or it cannot be differentiated twice.
        ValueError: no batch, an empty batch, a filter that selects nothing, no element in the
            selected parameters, parameters in float64 with JAX's 64-bit mode off, a loss that is
            not a scalar, weights that are negative, infinite or all zero, or arrays of different
            leading lengths in a batch that is to be split, or weighted by its length.
        FloatingPointError: the loss is not finite.
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable as loss(params, batch), got {loss!r}")
    make_map = functools.partial(GradientMap, loss=loss)
    return assemble(Hessian, make_map, params, batches, microbatch_size, where, linearize)
