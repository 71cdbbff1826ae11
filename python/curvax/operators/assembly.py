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
from curvax.operators.curvature import (
    Curvature,
    Part,
    Seconds,
    Stack,
    construction_clock,
    explained,
)
from curvax.operators.microbatch import MicrobatchMap
from curvax.operators.parameters import Structure, constants_of, widen
from curvax.operators.placement import check_not_typed_by_shards
from curvax.operators.products import Product
from curvax.operators.split import check_split
from curvax.operators.weights import check_values, warn_of_metric, warn_of_zeros, weighted_mean
from curvax.program import Clock
from curvax.typing import Batch, Batches, Params


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
    clock = construction_clock()
    with clock.part("host"):
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
        with explained((leaves, listed), bool(linearize)):
            try:
                budget = ResidualBudget.of(linearize, space, (leaves, listed))
                parts = _traced(clock, model, leaves, stacked, budget)
                stacks, means = Stack.all_of(clock, leaves, parts)
            except Exception as error:
                add_hint(error, batches)
                raise
        for stack, own in zip(stacks, means, strict=True):
            check_values(own, stack.weights, stack.positions)
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
    return kind(leaves, stacks, loss, weight, space, structure, Seconds(clock.parts()))


def _traced(
    clock: Clock,
    model: MicrobatchMap,
    leaves: tuple[Array, ...],
    stacked: list[tuple[Batch, list[int]]],
    budget: ResidualBudget,
) -> list[Part]:
    """The parts of `Stack.all_of`; the residuals of all stacks fit the budget."""
    parts: list[Part] = []
    with clock.part("trace"):
        for batch, positions in stacked:
            product = _product(model, leaves, batch, len(positions), budget)
            kept = len(positions) * product.bytes_of_one
            budget = dataclasses.replace(budget, bytes=budget.bytes - kept)
            parts.append((product, batch, jnp.asarray(positions, jnp.int32)))
    return parts


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
