"""Which of an operator's arrays lie in shards, for messages."""

from collections.abc import Iterator

import jax

from curvax.filters import leaf_names
from curvax.operators.base import Operator
from curvax.operators.curvature import Curvature


def sharded_arrays(op: Operator) -> list[str]:
    """The name of each of the operator's arrays in shards, with the sharding of it."""
    found = [
        f"{name} {getattr(array.sharding, 'spec', array.sharding)}"
        for name, array in _named(op)
        if isinstance(array, jax.Array) and not array.sharding.is_fully_replicated
    ]
    return list(dict.fromkeys(found))


def _named(op: Operator) -> Iterator[tuple[str, object]]:
    """Of a loss its parameters and data alone: what was computed of them lies as they do."""
    nodes = jax.tree_util.tree_leaves_with_path(op, is_leaf=lambda x: isinstance(x, Curvature))
    for path, node in nodes:
        if not isinstance(node, Curvature):
            place = jax.tree_util.keystr(path, simple=True, separator=".")
            yield f"the operator's array {place!r}", node
            continue
        for name, leaf in zip(_parameter_names(node), node.leaves, strict=True):
            yield f"parameter {name!r}", leaf
        for stack in node.stacks:
            # A row has lost the axis of the stack, and with it the first entry of the stack's spec.
            first = jax.tree.map(lambda leaf: leaf[0], stack.batch)
            for name, leaf in zip(leaf_names(first), jax.tree.leaves(first), strict=True):
                yield f"batch array {name!r}", leaf


def _parameter_names(op: Curvature) -> list[str]:
    constants, arrays = op.structure.constants, iter(op.leaves)
    count = op.structure.treedef.num_leaves
    leaves = [constants[i] if i in constants else next(arrays) for i in range(count)]
    names = leaf_names(jax.tree.unflatten(op.structure.treedef, leaves))
    return [name for i, name in enumerate(names) if i not in constants]
