"""The gradient of a loss on one microbatch, and its linearisation.

A linearisation has two halves: the primal half gives the residuals, which depend on the parameters
and the batch alone, and the linear half maps tangents through them. Residuals that are inputs of
the primal half (weights, data) are not kept a second time: they are put back when it is applied.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var

from curvax.operators.base import is_array
from curvax.operators.batches import leading_size, leading_sizes
from curvax.operators.hoist import Hoisted, hoist


@dataclasses.dataclass(frozen=True, eq=False)
class LinearHalf:
    """How to multiply by the Hessian of one microbatch. Static: hashed by identity.

    Attributes:
        primal: `(consts, leaves, batch) -> (mean, weight, residuals)`.
        residual_bytes: bytes of the residuals of one microbatch; 0 if they are recomputed.
        apply: `(consts, leaves, batch, residuals, tangents) -> products`, lists of leaves.
    """

    primal: Callable[..., Any]
    residual_bytes: int
    apply: Callable[..., list[Array]]


@dataclasses.dataclass(frozen=True)
class GradientMap:
    """The gradient of `loss` with respect to the chosen leaves of `params`.

    Attributes:
        loss: the loss.
        treedef: the structure of `params`.
        constants: the leaves of `params` that are not arrays, by their position.
        chosen: one bool for each of the other leaves.
        several: whether the loss is averaged over more than one batch, so that weights matter.
    """

    loss: Callable[[Any, Any], Any]
    treedef: Any
    constants: dict[int, Any]
    chosen: tuple[bool, ...]
    several: bool

    def _evaluate(self, leaves: Sequence[Array], batch: Any) -> tuple[Array, Any]:
        """The mean and the weight that the loss gives, checked."""
        arrays = iter(leaves)
        params = jax.tree.unflatten(
            self.treedef,
            [
                self.constants[i] if i in self.constants else next(arrays)
                for i in range(self.treedef.num_leaves)
            ],
        )
        result = self.loss(params, batch)
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
        return mean, weight

    def _length(self, batch: Any) -> int:
        if self.several and len(lengths := leading_sizes(batch)) > 1:
            raise ValueError(
                "a batch whose arrays have different leading lengths, here "
                f"{sorted(lengths)}, has no weight of its own among others: let the loss return a "
                "pair (mean, weight)"
            )
        return leading_size(batch) or 1

    def mean_and_weight(
        self, selected: Sequence[Array], leaves: Sequence[Array], batch: Any
    ) -> tuple[Array, tuple[Array, Array]]:
        """The mean as a function of the chosen leaves; the pair again, as auxiliary output.

        Raises:
            TypeError: the loss returns neither a real floating scalar nor a pair of them.
            ValueError: the loss returns an array that is not a scalar.
        """
        chosen = iter(selected)
        merged = [
            next(chosen) if taken else leaf for leaf, taken in zip(leaves, self.chosen, strict=True)
        ]
        mean, weight = self._evaluate(merged, batch)
        dtype = jnp.float64 if mean.dtype == jnp.float64 else jnp.float32
        weight = jax.lax.stop_gradient(jnp.asarray(weight)).astype(dtype)
        return mean, (mean.astype(dtype), weight)

    def _gradient(self, leaves: Sequence[Array], batch: Any) -> tuple[Callable[..., Any], Any]:
        """The gradient as a function of the chosen leaves, and the point where to take it."""

        def gradient(selected: Sequence[Array]) -> Any:
            return jax.grad(self.mean_and_weight, has_aux=True)(selected, leaves, batch)

        taken = [leaf for leaf, taken in zip(leaves, self.chosen, strict=True) if taken]
        return gradient, taken

    def _linear_map(self, leaves: Sequence[Array], batch: Any) -> Any:
        """`(auxiliary, linear map)`, both pytrees of arrays.

        A `custom_vjp` in the model refuses forward mode. The Hessian is its own transpose, so
        reverse over reverse then does as well, if the backward pass is itself differentiable.
        """
        gradient, taken = self._gradient(leaves, batch)
        try:
            _, linear, aux = jax.linearize(gradient, taken, has_aux=True)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            _, transposed, aux = _reverse(gradient, taken, error)
            return aux, jax.tree_util.Partial(_first, transposed)
        return aux, linear

    def _cast(self, tangents: list[Array], leaves: Sequence[Array]) -> list[Array]:
        """The tangents in the dtypes of the leaves: the operator's is the widest of them."""
        taken = [leaf for leaf, taken in zip(leaves, self.chosen, strict=True) if taken]
        return [t.astype(leaf.dtype) for t, leaf in zip(tangents, taken, strict=True)]

    def linearized(self, leaves: Sequence[Array], batch: Any) -> tuple[LinearHalf, tuple[Any, ...]]:
        """The linear half that reads kept residuals, and the arrays that the loss closes over."""
        structure: list[Any] = []

        def primal(leaves: Sequence[Array], batch: Any) -> Any:
            aux, linear = self._linear_map(leaves, batch)
            residuals, treedef = jax.tree.flatten(linear)
            structure[:] = [treedef]
            return aux, residuals

        traced, consts = hoist(primal, tuple(leaves), batch)
        sources = _sources(traced)
        kept = [i for i, source in enumerate(sources) if source is None]
        avals: list[Any] = [traced.jaxpr.outvars[2 + i].aval for i in kept]

        def reduced(consts: Any, leaves: Any, batch: Any) -> Any:
            (mean, weight), residuals = traced(consts, leaves, batch)
            return mean, weight, tuple(residuals[i] for i in kept)

        def apply(
            consts: Any, leaves: Any, batch: Any, residuals: Any, tangents: list[Array]
        ) -> list[Array]:
            given = jax.tree.leaves((consts, tuple(leaves), batch))
            own = iter(residuals or ())
            complete = [next(own) if s is None else given[s] for s in sources]
            return list(jax.tree.unflatten(structure[0], complete)(self._cast(tangents, leaves)))

        size = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
        return LinearHalf(reduced, size, apply), consts

    def recomputed(self, leaves: Sequence[Array], batch: Any) -> tuple[LinearHalf, tuple[Any, ...]]:
        """The linear half that computes its residuals anew in every product."""

        def product(leaves: Sequence[Array], batch: Any, tangents: Any) -> Any:
            gradient, taken = self._gradient(leaves, batch)
            try:
                return jax.jvp(lambda s: gradient(s)[0], (taken,), (tangents,))[1]
            except TypeError as error:
                if "custom_vjp" not in str(error):
                    raise
                return _reverse(gradient, taken, error)[1](tangents)[0]

        def evaluate(leaves: Sequence[Array], batch: Any) -> Any:
            _, taken = self._gradient(leaves, batch)
            return self.mean_and_weight(taken, leaves, batch)[1]

        taken = [leaf for leaf, taken in zip(leaves, self.chosen, strict=True) if taken]
        traced, consts = hoist(product, tuple(leaves), batch, taken)
        value, value_consts = hoist(evaluate, tuple(leaves), batch)

        def primal(consts: Any, leaves: Any, batch: Any) -> Any:
            return *value(consts[1], leaves, batch), ()

        def apply(
            consts: Any, leaves: Any, batch: Any, residuals: Any, tangents: list[Array]
        ) -> list[Array]:
            return list(traced(consts[0], leaves, batch, self._cast(tangents, leaves)))

        return LinearHalf(primal, 0, apply), (consts, value_consts)


def _first(transposed: Callable[[Any], Any], tangents: Any) -> Any:
    return transposed(tangents)[0]


def _reverse(gradient: Callable[..., Any], taken: Any, error: TypeError) -> Any:
    try:
        return jax.vjp(gradient, taken, has_aux=True)
    except Exception as second:
        raise TypeError(
            "the loss cannot be differentiated twice: it uses a jax.custom_vjp function, which "
            "refuses forward mode, and reverse over reverse fails too. Replace that function by "
            f"plain JAX operations or by one with a jax.custom_jvp rule. JAX says: {error}"
        ) from second


def _sources(traced: Hoisted) -> list[int | None]:
    """For each residual of a traced primal half: which input it is, or None if it is computed.

    A residual that occurs twice is kept twice only in name: XLA returns one buffer for each, so
    the second occurrence would cost memory; in practice `linearize` does not emit any.
    """
    inputs = [*traced.jaxpr.constvars, *traced.jaxpr.invars]
    position = {var: i for i, var in enumerate(inputs)}
    residuals = traced.jaxpr.outvars[2:]
    return [position.get(v) if isinstance(v, Var) else None for v in residuals]
