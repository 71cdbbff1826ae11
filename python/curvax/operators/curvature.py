"""Curvature of a mean loss over batches: stacks of microbatches, linearised where memory allows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.compiled import CHUNK, over_columns
from curvax.filters import Filter, leaf_names, select
from curvax.memory import SHARE, available_bytes
from curvax.operators.base import Operator, VectorSpace, check_float_dtype, is_array
from curvax.operators.batches import add_hint, stack_batches
from curvax.operators.fences import fence
from curvax.operators.linear_map import LinearHalf, ModelMap
from curvax.operators.placement import check_not_typed_by_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Stack:
    """Equal microbatches on a leading axis, with what is known at the fixed parameters.

    The residuals of a single microbatch have no such axis: XLA would copy them to take it off.
    """

    batch: Any
    consts: tuple[Any, ...]
    residuals: tuple[Array, ...] | None
    weights: Array
    half: LinearHalf = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, eq=False)
class _Structure:
    """Of `params`. Static: hashed by identity, as what is no array need not have a hash.

    Attributes:
        treedef: as JAX flattens it.
        constants: the leaves that are not arrays, by their positions.
    """

    treedef: Any
    constants: dict[int, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Curvature(Operator):
    """Second derivatives of the weighted mean loss over all batches, at fixed parameters.

    Attributes:
        loss: the weighted mean loss, a scalar array.
        weight: the sum of the weights.
    """

    leaves: tuple[Array, ...]
    stacks: tuple[_Stack, ...]
    loss: Array
    weight: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})
    structure: _Structure = dataclasses.field(metadata={"static": True})

    @property
    def num_microbatches(self) -> int:
        """Microbatches that the mean is over."""
        return sum(stack.weights.shape[0] for stack in self.stacks)

    @property
    def microbatch_weights(self) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """`(num_microbatches,)` their weights, of sum `weight`."""
        return np.concatenate([np.asarray(stack.weights) for stack in self.stacks])

    @property
    def residual_bytes(self) -> int:
        """Bytes held by the linearisation residuals."""
        kept = jax.tree.leaves([stack.residuals for stack in self.stacks])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        return fence(_weighted_product)(self, block)

    def at(self, params: Any) -> Self:
        """The same operator at other parameters, as of a later step of training.

        The batches stay, and nothing is compiled again. The two operators share their data, but
        each has its own linearisation residuals: let go of the one before.

        Args:
            params: as they were given, with other numbers in the arrays.

        Raises:
            ValueError: another structure, other shapes, or another leaf that is not an array.
            FloatingPointError: the loss is not finite.
        """
        treedef, constants = self.structure.treedef, self.structure.constants
        given, other = jax.tree.flatten(params)
        if other != treedef:
            raise ValueError(f"params must have the structure {treedef}, got {other}")
        for i, constant in constants.items():
            if given[i] != constant:
                raise ValueError(
                    f"leaf {i} of params is not an array, and so part of the program: it must stay "
                    f"{constant!r}, got {given[i]!r}; make it an array, or build the operator anew"
                )
        arrays = [leaf for i, leaf in enumerate(given) if i not in constants]
        for i, (old, new) in enumerate(zip(self.leaves, arrays, strict=True)):
            if np.shape(new) != old.shape:
                raise ValueError(
                    f"array {i} of params must have shape {old.shape}, got {np.shape(new)}"
                )
        pairs = zip(arrays, self.leaves, strict=True)
        leaves = tuple(jnp.asarray(new, old.dtype) for new, old in pairs)
        stacks, sums = [], []
        for stack in self.stacks:
            means, weights, residuals = _evaluate(stack.half, stack.consts, leaves, stack.batch)
            _check_values(means, weights, range(len(weights)))
            sums.append(_total(means, weights))
            kept = residuals if stack.half.residual_bytes else None
            stacks.append(dataclasses.replace(stack, weights=weights, residuals=kept))
        weight = _weight(stacks)
        loss = jnp.stack(sums).sum() / weight
        return dataclasses.replace(
            self, leaves=leaves, stacks=tuple(stacks), loss=loss, weight=weight
        )

    def microbatch(self, index: int) -> Self:
        """The operator of one microbatch alone, by its place among `num_microbatches`.

        Its attribute `loss` remains the mean over all.

        Raises:
            IndexError: there is none at that place.
            ValueError: its weight is 0.
        """
        place = index
        for stack in self.stacks:
            count = stack.weights.shape[0]
            if 0 <= place < count:
                if self.microbatch_weights[index] == 0:
                    raise ValueError(
                        f"microbatch {index} has the weight 0, and so no mean: choose one of those "
                        "with a weight in op.microbatch_weights"
                    )
                one = stack if count == 1 else _entry(stack, place)
                return dataclasses.replace(self, stacks=(one,), weight=jnp.sum(one.weights))
            place -= count
        raise IndexError(f"index must be from 0 to {self.num_microbatches - 1}, got {index}")


def _weighted_product(op: Curvature, block: Array) -> Array:
    total = sum(_stack_product(op, stack, block) for stack in op.stacks)
    return total / op.weight.astype(op.dtype)


def _stack_product(op: Curvature, stack: _Stack, block: Array) -> Array:
    apply = stack.half.apply
    if apply is None:
        return _sum_of_outer_products(op, stack, block)

    def one(entry: Any) -> Array:
        batch, residuals, weight = entry

        def column(flat: Array) -> Array:
            tangents = jax.tree.leaves(op.space.unravel(flat))
            out = apply(stack.consts, op.leaves, batch, residuals, tangents)
            return op.space.ravel(jax.tree.unflatten(op.space.treedef, out))

        rows = column(block[0])[None] if block.shape[0] == 1 else jax.vmap(column)(block)
        # A microbatch without any label has weight 0, and often the mean 0/0.
        return jnp.where(weight > 0, weight.astype(rows.dtype) * rows, 0)

    if stack.weights.shape[0] == 1:
        batch, weight = jax.tree.map(lambda leaf: leaf[0], (stack.batch, stack.weights))
        return one((batch, stack.residuals, weight))
    entries = (stack.batch, stack.residuals, stack.weights)

    def add(total: Array, entry: Any) -> tuple[Array, None]:
        return total + one(entry), None

    return jax.lax.scan(add, jnp.zeros_like(block), entries)[0]


def _sum_of_outer_products(op: Curvature, stack: _Stack, block: Array) -> Array:
    """Of microbatches with matrices `x xᵀ`: all at once, as products of matrices."""
    assert stack.residuals is not None
    count = stack.weights.shape[0]
    rows = [x.reshape(count, -1).astype(op.dtype) for x in stack.residuals]
    pieces = jnp.split(block, np.cumsum(op.space.sizes)[:-1], axis=1)
    inner = sum(_inner(x, piece) for x, piece in zip(rows, pieces, strict=True))
    inner = inner * stack.weights.astype(op.dtype)[None]
    out = [jnp.einsum("bn,ni->bi", inner, x, precision="highest") for x in rows]
    return jnp.concatenate(out, axis=1)


def _inner(rows: Array, block: Array) -> Array:
    """`block (b, n)` times the transpose of `rows (N, n)`; no sum of float32 is long."""

    def add(total: Array, first: Array, width: int) -> Array:
        x, v = (jax.lax.dynamic_slice_in_dim(a, first, width, axis=1) for a in (rows, block))
        return total + jnp.einsum("bi,ni->bn", v, x, precision="highest")

    n = rows.shape[1]
    if n <= 4 * CHUNK:
        return jnp.einsum("bi,ni->bn", block, rows, precision="highest")
    zeros = jnp.zeros((block.shape[0], rows.shape[0]), block.dtype)
    result: Array = over_columns(add, zeros, n)
    return result


Kind = TypeVar("Kind", bound=Curvature)


def assemble(
    kind: type[Kind],
    make_map: Callable[..., ModelMap],
    params: Any,
    batches: Any,
    microbatch_size: int | None,
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
        raise error_type(f"linearize must be True, False or 'auto', got {linearize!r}")
    chosen = select(params, where)
    check_not_typed_by_shards(params, "parameter")
    constants = _constants(params, chosen)
    leaves, space = _widen(params, chosen, constants)
    stacked, positions = stack_batches(batches, microbatch_size, num_batches, numbered)
    chosen = tuple(taken for i, taken in enumerate(chosen) if i not in constants)
    several = sum(map(len, positions)) > 1
    model = make_map(jax.tree.structure(params), constants, chosen, several)
    budget = {True: float("inf"), False: 0.0, "auto": SHARE * available_bytes()}[linearize]
    stacks: list[_Stack] = []
    sums: list[Array] = []
    for batch, places in zip(stacked, positions, strict=True):
        try:
            stack, means = _prepare(model, leaves, batch, len(places), budget)
        except Exception as error:
            add_hint(error, batches)
            raise
        budget -= sum(leaf.nbytes for leaf in jax.tree.leaves(stack.residuals))
        _check_values(means, stack.weights, places)
        sums.append(_total(means, stack.weights))
        stacks.append(stack)
    weight = _weight(stacks)
    if not isinstance(weight, jax.core.Tracer) and not weight > 0:
        raise ValueError(f"the weights that loss returned must have a positive sum, got {weight}")
    structure = _Structure(jax.tree.structure(params), constants)
    return kind(leaves, tuple(stacks), jnp.stack(sums).sum() / weight, weight, space, structure)


def _total(means: Array, weights: Array) -> Array:
    return jnp.sum(jnp.where(weights > 0, weights * means, 0))


def _weight(stacks: Sequence[_Stack]) -> Array:
    return jnp.stack([jnp.sum(stack.weights) for stack in stacks]).sum()


def _entry(stack: _Stack, place: int) -> _Stack:
    """One microbatch of several, as a stack of its own; `batch` keeps its leading axis."""
    batch, weights = jax.tree.map(
        lambda leaf: leaf[place : place + 1], (stack.batch, stack.weights)
    )
    residuals = jax.tree.map(lambda leaf: leaf[place], stack.residuals)
    return dataclasses.replace(stack, batch=batch, weights=weights, residuals=residuals)


def _constants(params: Any, chosen: tuple[bool, ...]) -> dict[int, Any]:
    """The leaves that are not arrays, by their position; they must not be selected."""
    constants = {}
    names = leaf_names(params)
    for i, (leaf, selected) in enumerate(zip(jax.tree.leaves(params), chosen, strict=True)):
        if is_array(leaf) or (selected and isinstance(leaf, float)):
            continue
        if selected:
            raise TypeError(
                f"parameter {names[i]!r} must be an array, got {type(leaf).__name__}: leave it out "
                "by where=, or, if it holds arrays, register its class as a pytree"
            )
        constants[i] = leaf
    return constants


def _widen(
    params: Any, chosen: tuple[bool, ...], constants: dict[int, Any]
) -> tuple[tuple[Array, ...], VectorSpace]:
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_names(params)
    widened: dict[int, Array] = {}
    dtype = np.dtype(np.float32)
    for i, leaf in enumerate(leaves):
        if i in constants:
            continue
        given = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
        if chosen[i]:
            own = check_float_dtype(given, f"parameter {names[i]!r}")
            dtype = max(dtype, own, key=lambda d: d.itemsize)
        narrow = jnp.issubdtype(given, jnp.floating) and np.dtype(given).itemsize < 4
        widened[i] = jnp.asarray(leaf, jnp.float32) if narrow else jnp.asarray(leaf)
    like = [widened[i] if selected else None for i, selected in enumerate(chosen)]
    space = VectorSpace.of(jax.tree.unflatten(treedef, like), dtype)
    if space.n == 0:
        shapes = dict(zip(space.names, space.shapes, strict=True))
        raise ValueError(f"params must have at least one element, got leaves of shapes {shapes}")
    return tuple(widened.values()), space


def _prepare(
    model: ModelMap, leaves: tuple[Array, ...], batch: Any, count: int, budget: float
) -> tuple[_Stack, Array]:
    """Evaluate the loss, and the residuals if they fit in `budget` bytes, on a stack."""
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    half, consts = model.linearized(leaves, first)
    if half.residual_bytes * count > budget:
        half, consts = model.recomputed(leaves, first)
    means, weights, residuals = _evaluate(half, consts, leaves, batch)
    return _Stack(batch, consts, residuals if half.residual_bytes else None, weights, half), means


def _evaluate(half: LinearHalf, consts: Any, leaves: Any, batch: Any) -> Any:
    """The means, weights and residuals of the microbatches of a stack."""
    single = jax.tree.leaves(batch)[0].shape[0] == 1
    return (_primal_of_one if single else _primal_of_many)(half, consts, leaves, batch)


def _primal_of_one(half: LinearHalf, consts: Any, leaves: Any, batch: Any) -> Any:
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    mean, weight, residuals = _primal(half, consts, leaves, first)
    return mean[None], weight[None], residuals


_primal = jax.jit(
    lambda half, consts, leaves, batch: fence(half.primal)(consts, leaves, batch),
    static_argnums=0,
)

_primal_of_many = jax.jit(
    lambda half, consts, leaves, batch: jax.lax.map(
        lambda entry: fence(half.primal)(consts, leaves, entry), batch
    ),
    static_argnums=0,
)


def _check_values(means: Array, weights: Array, positions: Sequence[int]) -> None:
    if isinstance(means, jax.core.Tracer):
        return
    given = np.asarray(weights)
    bad = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
    if bad.size:
        raise ValueError(
            "the weight that the loss returns must be finite and not negative, got "
            f"{given[bad[0]]} on batch {positions[bad[0]]}"
        )
    bad = np.flatnonzero(~np.isfinite(np.asarray(means)) & (given > 0))
    if bad.size:
        raise FloatingPointError(
            f"the loss is {np.asarray(means)[bad[0]]} on batch {positions[bad[0]]}: check the "
            "parameters, the data (a label out of range, or none to count?) and the loss"
        )
