"""The parameters of a model as the leaves of an operator, and other values for the same."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import shown
from curvax.filters import difference, leaf_names
from curvax.jaxpr_keys import Key, Keyed, key_of
from curvax.operators.batches import Microbatches
from curvax.operators.precision import Precision
from curvax.operators.space import VectorSpace, check_float_dtype, is_array
from curvax.typing import Batch, Params, PyTree, PyTreeDef


@dataclasses.dataclass(frozen=True, eq=False)
class Structure(Keyed):
    """Of parameters and batches. Static.

    Attributes:
        treedef: of the parameters, as JAX flattens them.
        constants: the leaves that are not arrays, by their positions.
        microbatch_size: as for `hessian`.
        num_batches: as for `hessian`.
        numbered: whether the microbatches are of the class `Numbered`.
        precision: of the products of matrices, as for `hessian`.
        prepare: what makes batches of a model's framework into those of an operator; None of a
            model that is given by its parts.
    """

    treedef: PyTreeDef
    constants: dict[int, object]
    microbatch_size: Microbatches
    num_batches: int | None
    numbered: bool
    precision: Precision | None
    prepare: Callable[[Batch], PyTree] | None = None

    @functools.cached_property
    def key(self) -> Key:
        """See `Keyed`."""
        return key_of(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def leaves(self, params: Params, like: tuple[Array, ...]) -> tuple[Array, ...]:
        """The arrays of other parameters, in the dtypes of those `like` which they are.

        Raises:
            TypeError: an array that is none of numbers, or of another kind of numbers.
            ValueError: another structure, other shapes, another leaf that is not an array, or
                numbers that do not fit.
        """
        given, other = jax.tree.flatten(params)
        if other != self.treedef:
            raise ValueError(f"params must have the structure {difference(self.treedef, other)}")
        names = leaf_names(params)
        for i, constant in self.constants.items():
            if given[i] != constant:
                raise ValueError(
                    f"leaf {i} of params, {names[i]!r}, is not an array, and so part of the "
                    f"program: it must stay {shown(constant)}, got {shown(given[i])}; make it an "
                    "array, or build the operator anew"
                )
        kept = [i for i in range(len(given)) if i not in self.constants]
        arrays = []
        for place, (i, old) in enumerate(zip(kept, like, strict=True)):
            if np.shape(given[i]) != old.shape:
                raise ValueError(
                    f"array {place} of params, {names[i]!r}, must have shape {old.shape}, got "
                    f"{np.shape(given[i])}"
                )
            arrays.append(to_array(given[i], f"parameter {names[i]!r}", old.dtype))
        return tuple(arrays)


def constants_of(params: Params, chosen: tuple[bool, ...]) -> dict[int, object]:
    """The leaves that are not arrays, by their position; they must not be selected.

    Raises:
        TypeError: one is.
    """
    constants = {}
    names = leaf_names(params)
    for i, (leaf, selected) in enumerate(zip(jax.tree.leaves(params), chosen, strict=True)):
        if is_array(leaf) or (selected and isinstance(leaf, float)):
            continue
        if selected:
            remedy = (
                "leave it out by where=, or, if it holds arrays, register its class as a pytree"
            )
            if type(leaf).__module__.partition(".")[0] == "torch":
                remedy = "make a model of its module by curvax.adapters.torch.from_module"
            raise TypeError(
                f"parameter {names[i]!r} must be an array, got {type(leaf).__name__}: {remedy}"
            )
        constants[i] = leaf
    return constants


def widen(
    params: Params, chosen: tuple[bool, ...], constants: dict[int, object]
) -> tuple[tuple[Array, ...], VectorSpace]:
    """The arrays of the parameters, in 32 bits at least, and the space of those chosen.

    Raises:
        TypeError: a chosen one is not real and floating, or an array has a mask.
        ValueError: none has an element, or numbers that JAX would narrow to others.
    """
    leaves, treedef = jax.tree.flatten(params)
    names = leaf_names(params)
    widened: dict[int, Array] = {}
    dtype = np.dtype(np.float32)
    for i, leaf in enumerate(leaves):
        if i in constants:
            continue
        what = f"parameter {names[i]!r}"
        given = leaf.dtype if hasattr(leaf, "dtype") else to_array(leaf, what).dtype
        if chosen[i]:
            own = check_float_dtype(given, what)
            dtype = max(dtype, own, key=lambda d: d.itemsize)
        narrow = jnp.issubdtype(given, jnp.floating) and np.dtype(given).itemsize < 4
        widened[i] = to_array(leaf, what, jnp.float32 if narrow else None)
    like = [widened[i] if selected else None for i, selected in enumerate(chosen)]
    space = VectorSpace.of(jax.tree.unflatten(treedef, like), dtype)
    if space.n == 0:
        shapes = dict(zip(space.names, space.shapes, strict=True))
        raise ValueError(
            f"params must have at least one element, got leaves of shapes {shown(shapes)}"
        )
    return tuple(widened.values()), space
