"""A symmetric map of one microbatch, such as its Hessian, cut into two halves.

The primal half gives the residuals, which depend on the parameters and the batch alone, and the
linear half maps tangents through them. Residuals that are inputs of the primal half (weights, data)
are not kept a second time: they are put back when it is applied.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.jax_internals import Var
from curvax.jaxprs import reads
from curvax.operators.base import is_array
from curvax.operators.batches import leading_size, leading_sizes
from curvax.operators.closure import Hoisted, hoist, refuse_pickling
from curvax.operators.precision import Precision, at_precision


@dataclasses.dataclass(frozen=True, eq=False)
class LinearHalf:
    """How to multiply by the matrix of one microbatch. Static: hashed by identity.

    Attributes:
        primal: `(consts, leaves, batch) -> (mean, weight, residuals)`.
        residual_bytes: bytes of the residuals of one microbatch; 0 if they are recomputed.
        apply: `(consts, leaves, batch, residuals, tangents) -> products`, lists of leaves. None if
            the matrix is `x xᵀ` and the residuals are x, as long as the tangents.
        weight_moves: whether the weight is computed from the chosen leaves.
    """

    primal: Callable[..., Any]
    residual_bytes: int
    apply: Callable[..., list[Array]] | None
    weight_moves: bool

    def __reduce__(self) -> Any:
        refuse_pickling()

    def __deepcopy__(self, memo: Any) -> "LinearHalf":
        return self


@dataclasses.dataclass(frozen=True)
class ModelMap(abc.ABC):
    """What multiplies tangents of the chosen leaves of `params`.

    Attributes:
        treedef: the structure of `params`.
        constants: the leaves of `params` that are not arrays, by their position.
        chosen: one bool for each of the other leaves.
        several: whether the loss is averaged over more than one batch, so that weights matter.
        precision: of the products of matrices in what is traced; None is JAX's setting.
    """

    treedef: Any
    constants: dict[int, Any]
    chosen: tuple[bool, ...]
    several: bool
    precision: Precision | None = dataclasses.field(default=None, kw_only=True)

    @abc.abstractmethod
    def evaluate(self, leaves: Sequence[Array], batch: Any) -> tuple[Array, Array]:
        """The mean loss and its weight."""

    @abc.abstractmethod
    def linear_map(self, leaves: Sequence[Array], batch: Any) -> tuple[tuple[Array, Array], Any]:
        """`((mean, weight), linear map)`, both pytrees of arrays."""

    @abc.abstractmethod
    def product(self, leaves: Sequence[Array], batch: Any, tangents: list[Array]) -> list[Array]:
        """One product, nothing kept."""

    def taken(self, leaves: Sequence[Array]) -> list[Array]:
        """The chosen leaves."""
        return [leaf for leaf, taken in zip(leaves, self.chosen, strict=True) if taken]

    def params(self, selected: Sequence[Array], leaves: Sequence[Array]) -> Any:
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

    def checked(self, result: Any, batch: Any) -> tuple[Array, tuple[Array, Array]]:
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

    def _length(self, batch: Any) -> int:
        if self.several and len(lengths := leading_sizes(batch)) > 1:
            raise ValueError(
                "a batch whose arrays have different leading lengths, here "
                f"{sorted(lengths)}, has no weight of its own among others: let the loss return a "
                "pair (mean, weight), as with 1 for each of equal parts of a batch"
            )
        return leading_size(batch) or 1

    def traced(self, fun: Callable[..., Any], *args: Any) -> tuple[Hoisted, tuple[Any, ...]]:
        """`hoist`, with the products in the precision."""
        return hoist(at_precision(fun, self.precision), *args)

    def _cast(self, tangents: list[Array], leaves: Sequence[Array]) -> list[Array]:
        """The tangents in the dtypes of the leaves: the operator's is the widest of them."""
        taken = self.taken(leaves)
        return [t.astype(leaf.dtype) for t, leaf in zip(tangents, taken, strict=True)]

    def linearized(self, leaves: Sequence[Array], batch: Any) -> tuple[LinearHalf, tuple[Any, ...]]:
        """The linear half that reads kept residuals, and the arrays that the loss closes over."""
        structure: list[Any] = []
        # A transpose is traced with the product, maybe under another setting than the loss was.
        setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

        def primal(leaves: Sequence[Array], batch: Any) -> Any:
            aux, linear = self.linear_map(leaves, batch)
            residuals, treedef = jax.tree.flatten(linear)
            structure[:] = [treedef]
            return aux, residuals

        traced, consts = self.traced(primal, tuple(leaves), batch)
        inputs = traced.jaxpr.invars
        position: dict[Any, int] = {var: i for i, var in enumerate(inputs)}
        kept: dict[int, Any] = {}
        # For each residual: which of the inputs it is, or, after those, which of what is kept.
        # One that occurs twice is kept once, as XLA would return two buffers.
        places = []
        for i, out in enumerate(traced.jaxpr.outvars[2:]):
            key = out if isinstance(out, Var) else i
            if key not in position:
                position[key] = len(inputs) + len(kept)
                kept[i] = out.aval
            places.append(position[key])

        def reduced(consts: Any, leaves: Any, batch: Any) -> Any:
            (mean, weight), residuals = traced(consts, leaves, batch)
            return mean, weight, tuple(residuals[i] for i in kept)

        def apply(
            consts: Any, leaves: Any, batch: Any, residuals: Any, tangents: list[Array]
        ) -> list[Array]:
            known = [*jax.tree.leaves((consts, tuple(leaves), batch)), *(residuals or ())]
            complete = [known[place] for place in places]
            linear = at_precision(jax.tree.unflatten(structure[0], complete), self.precision)
            with jax.default_matmul_precision(setting):
                return list(linear(self._cast(tangents, leaves)))

        size = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept.values())
        return LinearHalf(reduced, size, apply, self._weight_moves(traced)), consts

    def _weight_moves(self, traced: Hoisted) -> bool:
        """Whether the weight, the second of its results, is computed from the chosen leaves."""
        inputs = reads(traced.jaxpr, [1])[traced.closed_over :]
        return any(read and taken for read, taken in zip(inputs, self.chosen, strict=False))

    def recomputed(self, leaves: Sequence[Array], batch: Any) -> tuple[LinearHalf, tuple[Any, ...]]:
        """The linear half that computes its residuals anew in every product."""
        traced, consts = self.traced(self.product, tuple(leaves), batch, self.taken(leaves))
        value, value_consts = self.traced(self.evaluate, tuple(leaves), batch)

        def primal(consts: Any, leaves: Any, batch: Any) -> Any:
            return *value(consts[1], leaves, batch), ()

        def apply(
            consts: Any, leaves: Any, batch: Any, residuals: Any, tangents: list[Array]
        ) -> list[Array]:
            return list(traced(consts[0], leaves, batch, self._cast(tangents, leaves)))

        return LinearHalf(primal, 0, apply, self._weight_moves(value)), (consts, value_consts)
