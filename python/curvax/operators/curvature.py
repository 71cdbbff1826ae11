"""Curvature of a mean loss over batches: stacks of microbatches, linearised where memory allows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from curvax.arrays import shares
from curvax.operators.base import Operator
from curvax.operators.batches import match_stacks, read_batches, stack_batches, warn_of_pair
from curvax.operators.failures import Explained
from curvax.operators.parameters import Structure
from curvax.operators.precision import Precision
from curvax.operators.products import Product
from curvax.operators.space import VectorSpace
from curvax.operators.weights import check_values, warn_of_zeros, weighted_mean
from curvax.ops.fence import fence
from curvax.options import takes_options
from curvax.program import Argument, Clock, as_arguments, program, traced
from curvax.typing import Batch, Batches, FloatArray, Params, PyTree

# A product, the microbatches that it is of, and the batches that they came from.
Part: TypeAlias = tuple[Product, Batch, Array]


def construction_clock() -> Clock:
    """The clock of the field `seconds` of operators."""
    return Clock("trace", "evaluate", "host")


@jax.tree_util.register_pytree_node_class
class Seconds(dict[str, float]):
    """Wall seconds by part, and their `total`.

    Without leaves, and forgotten by what an operator passes through: a transformation that returns
    another operator did not make it in that time.
    """

    def tree_flatten(self) -> tuple[tuple[()], None]:
        """Nothing."""
        return (), None

    @classmethod
    def tree_unflatten(cls, auxiliary: None, children: tuple[()]) -> Self:
        """Of no part."""
        return cls()

    def plus(self, part: str, spent: float) -> "Seconds":
        """With one more part."""
        parts = {name: own for name, own in self.items() if name != "total"}
        return Seconds({**parts, part: spent, "total": self["total"] + spent})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """Equal microbatches on a leading axis, with what is known at the fixed parameters.

    Attributes:
        batch: the microbatches, stacked.
        weights: `(microbatches,)`.
        positions: `(microbatches,)` int32, of the batches that the microbatches came from.
        product: what multiplies by their matrices.
    """

    batch: Batch
    weights: Array
    positions: Array
    product: Product

    @classmethod
    def all_of(
        cls, clock: Clock, leaves: tuple[Array, ...], parts: Sequence[Part]
    ) -> tuple[tuple[Self, ...], list[Array]]:
        """The stacks, whose weights and residuals are computed; and the mean losses of each.

        By one program, which is kept as such, however many stacks there are.

        Args:
            clock: charged for it.
            leaves: of the parameters.
            parts: of each stack its product, its batch and its positions.
        """
        products = [product.holding(()) for product, _, _ in parts]
        batches = [batch for _, batch, _ in parts]
        with clock.part("evaluate"):
            results = jax.block_until_ready(_evaluate(clock, products, leaves, batches))
        stacks = tuple(
            cls(batch, weights, positions, product.holding(residuals))
            for (product, batch, positions), (_, weights, residuals) in zip(
                parts, results, strict=True
            )
        )
        return stacks, [means for means, _, _ in results]

    def entry(self, place: int) -> Self:
        """One microbatch of several, as a stack of its own; `batch` keeps its leading axis."""
        batch, weights, positions = jax.tree.map(
            lambda leaf: leaf[place : place + 1], (self.batch, self.weights, self.positions)
        )
        product = self.product.holding([leaf[place] for leaf in self.product.residuals])
        return dataclasses.replace(
            self, batch=batch, weights=weights, positions=positions, product=product
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WeightedSum(Operator):
    """What a product reads of a `Curvature`: the weighted mean of the matrices of microbatches."""

    leaves: tuple[Array, ...]
    stacks: tuple[Stack, ...]
    weight: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        return fence(_weighted_sum)(self, block)


def _weighted_sum(op: WeightedSum, block: Array) -> Array:
    alone = len(op.stacks) == 1 and op.stacks[0].weights.shape[0] == 1

    def share(stack: Stack) -> Array | None:
        # By a weight itself, a product may leave the range of float32.
        weights, whole = stack.weights.astype(op.dtype), op.weight.astype(op.dtype)
        return None if alone else shares(weights, whole)

    total: Any = sum(
        stack.product.multiply(op.space, op.leaves, stack.batch, share(stack), block)
        for stack in op.stacks
    )
    return total


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Curvature(Operator, Argument):
    """Second derivatives of the weighted mean loss over all batches, at fixed parameters.

    Attributes:
        loss: the weighted mean loss, a scalar array.
        weight: the sum of the weights.
        seconds: the wall time of its making, or of `at`, by part: `compile`, `trace`, `evaluate`
            (of the loss, and of what products share), `host`, `total`; for finite differences also
            `tuning`. Empty for an operator that a transformation of JAX returned.
    """

    leaves: tuple[Array, ...]
    stacks: tuple[Stack, ...]
    loss: Array
    weight: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})
    structure: Structure = dataclasses.field(metadata={"static": True})
    seconds: Seconds = dataclasses.field(default_factory=Seconds)

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
    def microbatch_weights(self) -> FloatArray:
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
        kept = jax.tree.leaves([stack.product.residuals for stack in self.stacks])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        return WeightedSum(self.leaves, self.stacks, self.weight, self.space).product(block)

    def as_argument(self) -> WeightedSum:
        """See `Argument`."""
        return self._argument

    @functools.cached_property
    def _argument(self) -> WeightedSum:
        stacks = as_arguments(self.stacks)
        return WeightedSum(self.leaves, stacks, self.weight, self.space)

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> Self:
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
        clock = construction_clock()
        with clock.part("host"):
            moved = self._at(clock, params, batches)
        return dataclasses.replace(moved, seconds=Seconds(clock.parts()))

    def _at(self, clock: Clock, params: Params, batches: Batches) -> Self:
        leaves = self.structure.leaves(params, self.leaves)
        old = self.stacks if batches is None else self._on(batches)
        with explained((leaves, old), bool(self.residual_bytes)):
            parts = [(stack.product, stack.batch, stack.positions) for stack in old]
            stacks, means = Stack.all_of(clock, leaves, parts)
        for stack, own in zip(stacks, means, strict=True):
            check_values(own, stack.weights, stack.positions)
        weights = [stack.weights for stack in stacks]
        loss, weight = weighted_mean(means, weights)
        if batches is not None:
            warn_of_zeros(weights, [stack.positions for stack in stacks])
        return dataclasses.replace(self, leaves=leaves, stacks=stacks, loss=loss, weight=weight)

    def _on(self, batches: Batches) -> list[Stack]:
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

    def prepared_by(self, prepare: Callable[[Batch], PyTree]) -> Self:
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
                one = stack if count == 1 else stack.entry(place)
                return dataclasses.replace(self, stacks=(one,), weight=jnp.sum(one.weights))
            place -= count
        raise IndexError(f"index must be from 0 to {self.num_microbatches - 1}, got {index}")


def explained(arrays: PyTree, linearized: bool) -> Explained:
    """What is said where the device fails the evaluation of the loss."""
    smaller = ["take smaller microbatches (microbatch_size=)"]
    if linearized:
        smaller.append("keep no linearisation residuals (linearize=False)")
    return Explained(arrays, smaller, "when the loss was evaluated")


def _evaluate(
    clock: Clock, products: list[Product], leaves: tuple[Array, ...], batches: list[Batches]
) -> Sequence[tuple[Array, Array, PyTree]]:
    """The means, weights and residuals of stacks of microbatches, compiled.

    Args:
        clock: charged for the compilation.
        products: of the matrices of each stack, without residuals.
        leaves: of the parameters.
        batches: the microbatches, stacked.
    """
    if traced(leaves, batches):
        return jax.jit(_evaluate_stacks.fun)(products, leaves, batches)
    return _evaluate_stacks(clock, products, leaves, batches)


@program(lasting=True)
def _evaluate_stacks(
    products: list[Product], leaves: PyTree, batches: list[Batches]
) -> list[tuple[Array, Array, PyTree]]:
    return [
        _evaluate_stack(product, leaves, batch)
        for product, batch in zip(products, batches, strict=True)
    ]


def _evaluate_stack(
    product: Product, leaves: PyTree, batches: Batches
) -> tuple[Array, Array, PyTree]:
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        mean, weight, residuals = fence(_primal)(product, leaves, first)
        return mean[None], weight[None], residuals
    result: tuple[Array, Array, PyTree] = jax.lax.map(
        lambda batch: fence(_primal)(product, leaves, batch), batches
    )
    return result


def _primal(product: Product, leaves: PyTree, batch: Batch) -> tuple[Array, Array, PyTree]:
    return product.evaluate(leaves, batch)
