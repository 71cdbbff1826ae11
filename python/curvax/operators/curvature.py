"""Curvature of a mean loss over batches: stacks of microbatches, linearised where memory allows."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import shares
from curvax.checks import shown
from curvax.columns import CHUNK, over_columns
from curvax.filters import Filter, select
from curvax.operators.base import Operator, VectorSpace
from curvax.operators.batches import (
    Microbatches,
    add_hint,
    match_stacks,
    read_batches,
    stack_batches,
    warn_of_pair,
)
from curvax.operators.budget import ResidualBudget
from curvax.operators.failures import Explained
from curvax.operators.microbatch import LinearHalf, ModelMap
from curvax.operators.parameters import Structure, constants_of, widen
from curvax.operators.placement import check_not_typed_by_shards
from curvax.operators.precision import Precision
from curvax.operators.split import check_split
from curvax.operators.weights import check_values, warn_of_metric, warn_of_zeros, weighted_mean
from curvax.ops.fence import fence
from curvax.program import jit


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
    positions: Array  # of the batches that the entries came from
    half: LinearHalf = dataclasses.field(metadata={"static": True})


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
    structure: Structure = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        text = super().__repr__().removesuffix(")")
        if not isinstance(self.weight, Array) or isinstance(self.weight, jax.core.Tracer):
            return f"{text})"
        data = f"batches={self.num_batches}, samples={self._samples()}, weight={self.weight:g}"
        precision = f", precision={self.precision!r}" if self.precision else ""
        return f"{text}, {data}, loss={self.loss:.6g}{precision})"

    def _samples(self) -> str:
        """The lengths of the batches' leading axes, summed up; of several lengths, of each."""
        totals: dict[int, int] = {}
        for stack in self.stacks:
            shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(stack.batch)]
            lengths = sorted({shape[0] for shape in shapes if shape})
            for i, length in enumerate(lengths or [1]):
                totals[i] = totals.get(i, 0) + length * stack.weights.shape[0]
        return " and ".join(map(str, totals.values()))

    @property
    def precision(self) -> Precision | None:
        """Of the products of matrices in the loss and its derivatives, as for `hessian`."""
        return self.structure.precision

    @property
    def num_batches(self) -> int:
        """Batches that the mean is over."""
        return len(np.unique(np.concatenate([stack.positions for stack in self.stacks])))

    @property
    def num_microbatches(self) -> int:
        """Microbatches that the mean is over."""
        return sum(stack.weights.shape[0] for stack in self.stacks)

    @property
    def microbatch_weights(self) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """`(num_microbatches,)` their weights, of sum `weight`."""
        return np.concatenate([np.asarray(stack.weights) for stack in self.stacks])

    @property
    def microbatch_samples(self) -> int:
        """The longest leading axis of an array in a microbatch."""
        shapes = [leaf.shape for stack in self.stacks for leaf in jax.tree.leaves(stack.batch)]
        return max((shape[1] for shape in shapes if len(shape) > 1), default=1)

    @property
    def residual_bytes(self) -> int:
        """Bytes held by the linearisation residuals."""
        kept = jax.tree.leaves([stack.residuals for stack in self.stacks])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        return fence(_weighted_product)(self, block)

    def at(self, params: Any, *, batches: Any = None) -> Self:
        """The same operator at other parameters, as of a later step of training, or on other data.

        Nothing is compiled again. The two operators share their data, unless there are others, but
        each has its own linearisation residuals: let go of the one before.

        Args:
            params: as they were given, with other numbers in the arrays.
            batches: others in place of those that the operator has, as many and of the same
                structure and shapes; `microbatch_size` and `num_batches` stay. None for the same.

        Raises:
            TypeError: numbers of another kind, as complex ones.
            ValueError: another structure, other shapes, or another leaf that is not an array.
            FloatingPointError: the loss is not finite.
        """
        leaves = self.structure.leaves(params, self.leaves)
        old = self.stacks if batches is None else self._on(batches)
        means, stacks = [], []
        with _explained((leaves, old), bool(self.residual_bytes)):
            for stack in old:
                own, weights, residuals = _evaluate(stack.half, stack.consts, leaves, stack.batch)
                check_values(own, weights, stack.positions)
                means.append(own)
                kept = residuals if stack.half.residual_bytes else None
                stacks.append(dataclasses.replace(stack, weights=weights, residuals=kept))
        weights = [stack.weights for stack in stacks]
        loss, weight = weighted_mean(means, weights)
        if batches is not None:
            warn_of_zeros(weights, [stack.positions for stack in stacks])
        return dataclasses.replace(
            self, leaves=leaves, stacks=tuple(stacks), loss=loss, weight=weight
        )

    def _on(self, batches: Any) -> list[_Stack]:
        """The stacks with other batches; weights and residuals are still those of the old ones."""
        given, own = batches, self.structure
        if own.prepare is not None:
            given = own.prepare(batches)
        listed = read_batches(given, own.num_batches)
        stacked = stack_batches(listed, own.microbatch_size, own.numbered)
        matched = match_stacks(stacked, [stack.batch for stack in self.stacks])
        warn_of_pair(batches)
        return [
            dataclasses.replace(stack, batch=batch, positions=jnp.asarray(positions, jnp.int32))
            for stack, (batch, positions) in zip(self.stacks, matched, strict=True)
        ]

    def prepared_by(self, prepare: Callable[[Any], Any]) -> Self:
        """The same, with what `at` makes other batches of a model's framework into its own by."""
        structure = dataclasses.replace(self.structure, prepare=prepare)
        return dataclasses.replace(self, structure=structure)

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
    total: Any = sum(_stack_product(op, stack, block) for stack in op.stacks)
    return total


def _stack_product(op: Curvature, stack: _Stack, block: Array) -> Array:
    apply = stack.half.apply
    if apply is None:
        return _sum_of_outer_products(op, stack, block)

    def one(entry: Any) -> Array:
        batch, residuals, weight = entry
        share = _share(op, weight)

        def column(flat: Array) -> Array:
            tangents = jax.tree.leaves(op.space.unravel(flat))
            out = apply(stack.consts, op.leaves, batch, residuals, tangents)
            return op.space.ravel(jax.tree.unflatten(op.space.treedef, out))

        rows = column(block[0])[None] if block.shape[0] == 1 else jax.vmap(column)(block)
        # A microbatch without any label has weight 0, and often the mean 0/0.
        return jnp.where(share > 0, share * rows, 0)

    if stack.weights.shape[0] == 1:
        batch, weight = jax.tree.map(lambda leaf: leaf[0], (stack.batch, stack.weights))
        return one((batch, stack.residuals, weight))
    entries = (stack.batch, stack.residuals, stack.weights)

    def add(total: Array, entry: Any) -> tuple[Array, None]:
        return total + one(entry), None

    return jax.lax.scan(add, jnp.zeros_like(block), entries)[0]


def _share(op: Curvature, weights: Array) -> Array:
    """What is multiplied: by a weight itself, a product may leave the range of float32."""
    return shares(weights.astype(op.dtype), op.weight.astype(op.dtype))


def _sum_of_outer_products(op: Curvature, stack: _Stack, block: Array) -> Array:
    """Of microbatches with matrices `x xᵀ`: all at once, as products of matrices."""
    assert stack.residuals is not None
    count = stack.weights.shape[0]
    rows = [x.reshape(count, -1).astype(op.dtype) for x in stack.residuals]
    pieces = jnp.split(block, np.cumsum(op.space.sizes)[:-1], axis=1)
    inner = sum(_inner(x, piece) for x, piece in zip(rows, pieces, strict=True))
    inner = inner * _share(op, stack.weights)[None]
    out = [jnp.einsum("bn,ni->bi", inner, x, precision="highest") for x in rows]
    return jnp.concatenate(out, axis=1)


def _inner(rows: Array, block: Array) -> Array:
    """`block (b, n)` times the transpose of `rows (N, n)`; no sum of float32 is long."""

    def add(total: Array, first: Array, width: int) -> Array:
        x, v = (jax.lax.dynamic_slice_in_dim(a, first, width, axis=1) for a in (rows, block))
        return total + _inner_by_panels(x, v)

    n = rows.shape[1]
    if n <= 4 * CHUNK:
        return jnp.einsum("bi,ni->bn", block, rows, precision="highest")
    shape = (block.shape[0], rows.shape[0])
    result: Array = over_columns(add, jnp.zeros(shape, block.dtype), n, rows=sum(shape))
    return result


def _inner_by_panels(rows: Array, block: Array) -> Array:
    """As `_inner`, of a step's columns: each sum is over at most twice a `CHUNK` of them."""
    panels = block.shape[1] // CHUNK
    if panels <= 1:
        return jnp.einsum("bi,ni->bn", block, rows, precision="highest")
    v, x = (a[:, : panels * CHUNK].reshape(-1, panels, CHUNK) for a in (block, rows))
    inner = jnp.sum(jnp.einsum("bpi,npi->pbn", v, x, precision="highest"), axis=0)
    v, x = (a[:, panels * CHUNK :] for a in (block, rows))
    return inner + jnp.einsum("bi,ni->bn", v, x, precision="highest")


Kind = TypeVar("Kind", bound=Curvature)


def assemble(
    kind: type[Kind],
    make_map: Callable[..., ModelMap],
    params: Any,
    batches: Any,
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
    stacks: list[_Stack] = []
    means: list[Array] = []
    with _explained((leaves, listed), bool(linearize)):
        for batch, positions in stacked:
            try:
                stack, own = _prepare(model, leaves, batch, positions, budget)
            except Exception as error:
                add_hint(error, batches)
                raise
            kept = sum(leaf.nbytes for leaf in jax.tree.leaves(stack.residuals))
            budget = dataclasses.replace(budget, bytes=budget.bytes - kept)
            check_values(own, stack.weights, positions)
            means.append(own)
            stacks.append(stack)
    weights = [stack.weights for stack in stacks]
    loss, weight = weighted_mean(means, weights)
    if callable(microbatch_size):
        check_split(model, leaves, listed, loss, numbered)
    warn_of_pair(batches)
    warn_of_zeros(weights, [positions for _, positions in stacked])
    if any(stack.half.weight_moves for stack in stacks):
        warn_of_metric()
    structure = Structure(
        treedef, constants, microbatch_size, num_batches, numbered, model.precision
    )
    return kind(leaves, tuple(stacks), loss, weight, space, structure)


def _explained(arrays: Any, linearized: bool) -> Explained:
    """What is said where the device fails the evaluation of the loss."""
    smaller = ["take smaller microbatches (microbatch_size=)"]
    if linearized:
        smaller.append("keep no linearisation residuals (linearize=False)")
    return Explained(arrays, smaller, "when the loss was evaluated")


def _entry(stack: _Stack, place: int) -> _Stack:
    """One microbatch of several, as a stack of its own; `batch` keeps its leading axis."""
    batch, weights, positions = jax.tree.map(
        lambda leaf: leaf[place : place + 1], (stack.batch, stack.weights, stack.positions)
    )
    residuals = jax.tree.map(lambda leaf: leaf[place], stack.residuals)
    return dataclasses.replace(
        stack, batch=batch, weights=weights, positions=positions, residuals=residuals
    )


def _prepare(
    model: ModelMap,
    leaves: tuple[Array, ...],
    batch: Any,
    positions: list[int],
    budget: ResidualBudget,
) -> tuple[_Stack, Array]:
    """Evaluate the loss, and the residuals if they fit the budget, on a stack."""
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    half, consts = model.linearized(leaves, first)
    if half.residual_bytes * (len(positions) + budget.scratch) > budget.bytes:
        half, consts = model.recomputed(leaves, first)
    means, weights, residuals = _evaluate(half, consts, leaves, batch)
    kept, places = residuals if half.residual_bytes else None, jnp.asarray(positions, jnp.int32)
    return _Stack(batch, consts, kept, weights, places, half), means


def _evaluate(half: LinearHalf, consts: Any, leaves: Any, batch: Any) -> Any:
    """The means, weights and residuals of the microbatches of a stack."""
    single = jax.tree.leaves(batch)[0].shape[0] == 1
    return (_primal_of_one if single else _primal_of_many)(half, consts, leaves, batch)


def _primal_of_one(half: LinearHalf, consts: Any, leaves: Any, batch: Any) -> Any:
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    mean, weight, residuals = _primal(half, consts, leaves, first)
    return mean[None], weight[None], residuals


_primal = jit(
    lambda half, consts, leaves, batch: fence(half.primal)(consts, leaves, batch),
    static=0,
)

_primal_of_many = jit(
    lambda half, consts, leaves, batch: jax.lax.map(
        lambda entry: fence(half.primal)(consts, leaves, entry), batch
    ),
    static=0,
)
