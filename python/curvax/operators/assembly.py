"""How an operator of a loss is put together, of parameters, batches and traced functions."""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from curvax.checks import shown
from curvax.filters import Filter, select
from curvax.operators.batches import (
    Microbatches,
    add_hint,
    read_batches,
    stack_batches,
    warn_of_pair,
)
from curvax.operators.budget import ResidualBudget
from curvax.operators.curvature import Curvature, Stack, explained
from curvax.operators.microbatch import MicrobatchMap
from curvax.operators.parameters import Structure, constants_of, widen
from curvax.operators.placement import check_not_typed_by_shards
from curvax.operators.products import Product
from curvax.operators.split import check_split
from curvax.operators.weights import check_values, warn_of_metric, warn_of_zeros, weighted_mean
from curvax.typing import Batches, Params


class CurvatureOptions(TypedDict, total=False):
    """Options of all operators of a loss; see `hessian`."""

    microbatch_size: Microbatches
    num_batches: int | None
    where: Filter | None
    linearize: bool | Literal["auto"]


Kind = TypeVar("Kind", bound=Curvature)


def assemble(
    kind: type[Kind],
    make_map: Callable[..., MicrobatchMap],
    params: Params,
    batches: Batches,
    *,
    microbatch_size: Microbatches,
    num_batches: int | None,
    where: Filter | None,
    linearize: bool | Literal["auto"],
    numbered: bool = False,
) -> Kind:
    """The operator of class `kind` whose microbatches are multiplied by `make_map(...)`.

    With `numbered`, these are of the class `Numbered`. See `hessian` for the other arguments and
    what is raised.
    """
    if not isinstance(linearize, bool) and linearize != "auto":
        error_type = ValueError if isinstance(linearize, str) else TypeError
        raise error_type(f"linearize must be True, False or 'auto', got {shown(linearize)}")
    chosen = select(params, where)
    check_not_typed_by_shards(params, "parameter")
    constants = constants_of(params, chosen)
    leaves, space = widen(params, chosen, constants)
    listed = read_batches(batches, num_batches)
    stacked = stack_batches(listed, microbatch_size, numbered)
    chosen = tuple(taken for i, taken in enumerate(chosen) if i not in constants)
    several = sum(len(positions) for _, positions in stacked) > 1
    treedef = jax.tree.structure(params)
    model = make_map(treedef, constants, chosen, several)
    budget = ResidualBudget.of(linearize, space, (leaves, listed))
    stacks: list[Stack] = []
    means: list[Array] = []
    with explained((leaves, listed), bool(linearize)):
        for batch, positions in stacked:
            try:
                product = _product(model, leaves, batch, len(positions), budget)
                stack, own = Stack.of(product, leaves, batch, jnp.asarray(positions, jnp.int32))
            except Exception as error:
                add_hint(error, batches)
                raise
            check_values(own, stack.weights, positions)
            kept = sum(leaf.nbytes for leaf in stack.product.residuals)
            budget = dataclasses.replace(budget, bytes=budget.bytes - kept)
            means.append(own)
            stacks.append(stack)
    weights = [stack.weights for stack in stacks]
    loss, weight = weighted_mean(means, weights)
    if callable(microbatch_size):
        check_split(model, leaves, listed, loss, numbered)
    warn_of_pair(batches)
    warn_of_zeros(weights, [positions for _, positions in stacked])
    if any(model.weight_moves(stack.product.primal) for stack in stacks):
        warn_of_metric()
    structure = Structure(
        treedef, constants, microbatch_size, num_batches, numbered, model.precision
    )
    return kind(leaves, tuple(stacks), loss, weight, space, structure)


def _product(
    model: MicrobatchMap,
    leaves: tuple[Array, ...],
    batches: Batches,
    count: int,
    budget: ResidualBudget,
) -> Product:
    """What multiplies by the matrices of a stack of microbatches; its residuals fit the budget."""
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    limit = budget.bytes / (count + budget.scratch)
    return model.keeping(leaves, first, limit) or model.recomputing(leaves, first)
