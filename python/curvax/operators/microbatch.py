"""The matrix of one microbatch: what is traced of a loss, and how that becomes a product."""

import abc
import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.jax_internals import JaxprEqn, Var, is_broadcast
from curvax.jaxprs import origins, reads
from curvax.operators.activations import opened, with_whole_activations
from curvax.operators.batches import leading_size, leading_sizes
from curvax.operators.closure import Closed, Traced, close
from curvax.operators.precision import Precision, at_precision
from curvax.operators.products import Linearised, Product, Recomputed
from curvax.operators.space import is_array
from curvax.typing import Batch, LossValue, PyTree, PyTreeDef


class Primal(NamedTuple):
    """The primal half of a linearisation.

    Attributes:
        function: `(leaves, batch) -> (mean, weight, operands)` of the linear half.
        linear_map: the structure of the linear half, of which the operands are the leaves, after
            `spreads`.
        spreads: of an operand that is broadcast, the equation that does it, whose operand it is.
        kept: which of the operands are residuals, as for `Linearised`.
        places: of each operand, as for `Linearised`.
        nbytes: of the residuals.
    """

    function: Closed
    linear_map: PyTree
    spreads: tuple[JaxprEqn | None, ...]
    kept: tuple[int, ...]
    places: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class MicrobatchMap(abc.ABC):
    """What multiplies tangents of the chosen leaves of `params`.

    Attributes:
        treedef: the structure of `params`.
        constants: the leaves of `params` that are not arrays, by their position.
        chosen: one bool for each of the other leaves.
        several: whether the loss is averaged over more than one batch, so that weights matter.
        precision: of the products of matrices in what is traced; None is JAX's setting.
        keeps: whether what is traced is to be linearised once, for all products.
    """

    treedef: PyTreeDef
    constants: dict[int, object]
    chosen: tuple[bool, ...]
    several: bool
    precision: Precision | None = dataclasses.field(default=None, kw_only=True)
    keeps: bool = dataclasses.field(default=False, kw_only=True)

    @abc.abstractmethod
    def evaluate(self, leaves: Sequence[Array], batch: Batch) -> tuple[Array, Array]:
        """The mean loss and its weight."""

    @abc.abstractmethod
    def recomputing(self, leaves: Sequence[Array], batch: Batch) -> Product:
        """What multiplies and keeps nothing."""

    def keeping(self, leaves: Sequence[Array], batch: Batch, limit: float) -> Product | None:
        """What multiplies by residuals, without them; None if there are none within `limit`."""
        return None

    def value(self, leaves: Sequence[Array], batch: Batch) -> Closed:
        """The primal half of what keeps nothing."""
        return self.traced(lambda *args: (*self.evaluate(*args), ()), leaves, batch)

    def weight_moves(self, primal: Closed) -> bool:
        """Whether the weight, the second of its results, is computed from the chosen leaves."""
        jaxpr = primal.traced.jaxpr
        inputs = reads(jaxpr, [1])[len(primal.consts) :]
        return any(read and taken for read, taken in zip(inputs, self.chosen, strict=False))

    def taken(self, leaves: Sequence[Array]) -> list[Array]:
        """The chosen leaves."""
        return [leaf for leaf, taken in zip(leaves, self.chosen, strict=True) if taken]

    def tangents(self, leaves: Sequence[Array]) -> list[jax.ShapeDtypeStruct]:
        """The types of vectors: those of the chosen leaves, in the widest dtype of them."""
        taken = self.taken(leaves)
        dtype = max((leaf.dtype for leaf in taken), key=lambda own: own.itemsize)
        return [jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf in taken]

    def params(self, selected: Sequence[Array], leaves: Sequence[Array]) -> PyTree:
        """The parameters, with the chosen leaves replaced by `selected`."""
        chosen = iter(selected)
        arrays = iter(
            next(chosen) if taken else leaf for leaf, taken in zip(leaves, self.chosen, strict=True)
        )
        complete = [
            self.constants[i] if i in self.constants else next(arrays)
            for i in range(self.treedef.num_leaves)
        ]
        return jax.tree.unflatten(self.treedef, complete)

    def checked(self, result: PyTree, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
        """What a loss returned: its mean, to be differentiated, and the pair of mean and weight.

        Raises:
            TypeError: neither a real floating scalar nor a pair of them.
            ValueError: an array that is not a scalar, or a weight that is not known.
        """
        is_pair = isinstance(result, tuple) and len(result) == 2
        mean, weight = result if is_pair else (result, self._length(batch))
        if not is_array(mean):
            raise TypeError(
                "loss must return a scalar array that depends on the parameters, or a pair "
                f"(mean, weight) of which the mean does, got {type(mean).__name__}"
            )
        if not (is_array(weight) or isinstance(weight, (int, float))):
            raise TypeError(f"loss must return a scalar weight, got {type(weight).__name__}")
        for name, part in (("mean", mean), ("weight", weight)):
            if np.shape(part) != ():
                raise ValueError(
                    f"loss must return a scalar {name}, got shape {np.shape(part)}: reduce it with "
                    "jnp.mean"
                )
        if not jnp.issubdtype(mean.dtype, jnp.floating):
            raise TypeError(f"loss must return a real floating scalar, got {mean.dtype}")
        dtype = jnp.float64 if mean.dtype == jnp.float64 else jnp.float32
        weight = jax.lax.stop_gradient(jnp.asarray(weight)).astype(dtype)
        return mean, (mean.astype(dtype), weight)

    def _length(self, batch: Batch) -> int:
        if self.several and len(lengths := leading_sizes(batch)) > 1:
            raise ValueError(
                "a batch whose arrays have different leading lengths, here "
                f"{sorted(lengths)}, has no weight of its own among others: let the loss return a "
                "pair (mean, weight), as with 1 for each of equal parts of a batch"
            )
        return leading_size(batch) or 1

    def traced(self, fun: Callable[..., PyTree], *args: object) -> Closed:
        """`close`, with the products in the precision, and activation functions no longer whole."""
        return opened(close(at_precision(fun, self.precision), *args))

    def whole(self, fun: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """What is differentiated, with activation functions whole if derivatives are kept."""
        # Computed anew in each product, derivatives of the second order cost more than their parts.
        return with_whole_activations(fun) if self.keeps else fun

    def cast(self, tangents: list[Array], leaves: Sequence[Array]) -> list[Array]:
        """The tangents in the dtypes of the leaves."""
        taken = self.taken(leaves)
        return [t.astype(leaf.dtype) for t, leaf in zip(tangents, taken, strict=True)]


class LinearMap(MicrobatchMap):
    """What linearises a function, or evaluates its derivative anew in every product."""

    @abc.abstractmethod
    def linear_map(
        self, leaves: Sequence[Array], batch: Batch
    ) -> tuple[tuple[Array, Array], PyTree]:
        """`((mean, weight), linear map)`, both pytrees of arrays."""

    def product(self, leaves: Sequence[Array], batch: Batch, tangents: list[Array]) -> list[Array]:
        """One product, nothing kept."""
        return list(self.linear_map(leaves, batch)[1](tangents))

    def recomputing(self, leaves: Sequence[Array], batch: Batch) -> Product:
        """See `MicrobatchMap`."""
        whole = self.traced(self._of_cast, leaves, batch, self.tangents(leaves))
        return Recomputed(self.value(leaves, batch), (), whole)

    def keeping(self, leaves: Sequence[Array], batch: Batch, limit: float) -> Product | None:
        """See `MicrobatchMap`."""
        primal = self.primal(leaves, batch)
        return self.linearised(primal, leaves) if primal.nbytes <= limit else None

    def primal(self, leaves: Sequence[Array], batch: Batch) -> Primal:
        """The primal half of the linearisation.

        An operand that is an input is not kept a second time, and one that occurs twice is kept
        once: XLA would return two buffers. One that is broadcast is kept as it was before.
        """
        keeping = dataclasses.replace(self, keeps=True)
        traced = self.traced(keeping.linear_map, leaves, batch)
        jaxpr = traced.traced.jaxpr
        broadcasts = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if is_broadcast(eqn)}
        own = jaxpr.outvars[2:]
        spreads = [broadcasts.get(out) if isinstance(out, Var) else None for out in own]
        own = [eqn.invars[0] if eqn else out for out, eqn in zip(own, spreads, strict=True)]
        origin = origins(jaxpr)
        position: dict[Hashable, int] = {var: i for i, var in enumerate(jaxpr.invars)}
        kept: list[int] = []
        places: list[int] = []
        nbytes = 0
        for i, out in enumerate(own):
            aval: Any = out.aval
            key = origin(out) if isinstance(out, Var) else i
            if key not in position:
                position[key] = len(jaxpr.invars) + len(kept)
                kept.append(i)
                nbytes += math.prod(aval.shape) * aval.dtype.itemsize
            places.append(position[key])
        _, linear_map = traced.traced.out_tree.children()
        outvars = [*jaxpr.outvars[:2], *own]
        flat = Traced(jaxpr.replace(outvars=outvars), jax.tree.structure((0, 0, places)))
        function = Closed(traced.consts, flat)
        return Primal(function, linear_map, tuple(spreads), tuple(kept), tuple(places), nbytes)

    def linearised(self, primal: Primal, leaves: Sequence[Array]) -> Linearised:
        """The product with the residuals of a linearisation, without them."""

        def linear(operands: list[Array], tangents: list[Array]) -> list[Array]:
            spread = [
                eqn.primitive.bind(operand, **eqn.params) if eqn else operand
                for operand, eqn in zip(operands, primal.spreads, strict=True)
            ]
            apply = jax.tree.unflatten(primal.linear_map, spread)
            return list(apply(self.cast(tangents, leaves)))

        operands = [out.aval for out in primal.function.traced.jaxpr.outvars[2:]]
        traced = self.traced(linear, operands, self.tangents(leaves))
        return Linearised(primal.function, (), traced, primal.kept, primal.places)

    def _of_cast(self, leaves: PyTree, batch: Batch, tangents: list[Array]) -> list[Array]:
        return self.product(leaves, batch, self.cast(tangents, leaves))


@dataclasses.dataclass(frozen=True)
class LossMap(MicrobatchMap):
    """A matrix of second derivatives of `loss(params, batch)`, by its gradient."""

    loss: Callable[[PyTree, Batch], LossValue]

    def evaluate(self, leaves: Sequence[Array], batch: Batch) -> tuple[Array, Array]:
        """See `MicrobatchMap`."""
        return self._mean(self.taken(leaves), leaves, batch)[1]

    def gradient(self, leaves: Sequence[Array], batch: Batch) -> Callable[..., PyTree]:
        """A function of the chosen leaves that returns the gradient, and mean and weight."""

        def gradient(selected: Sequence[Array]) -> PyTree:
            return jax.grad(self.whole(self._mean), has_aux=True)(selected, leaves, batch)

        return gradient

    def _mean(
        self, selected: Sequence[Array], leaves: Sequence[Array], batch: Batch
    ) -> tuple[Array, tuple[Array, Array]]:
        return self.checked(self.loss(self.params(selected, leaves), batch), batch)
