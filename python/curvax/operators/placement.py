"""Where arrays lie. Those on one device, replicated, or sharded over a mesh that XLA partitions."""

import jax

from curvax.filters import leaf_names
from curvax.typing import PyTree


def check_not_typed_by_shards(tree: PyTree, what: str) -> None:
    """Refuse arrays whose type says how they are sharded, which what is derived here ignores.

    Args:
        tree: a pytree of anything.
        what: what its arrays are, for messages.

    Raises:
        ValueError: an array is sharded over an axis of the type `Explicit`.
    """
    for leaf, name in zip(jax.tree.leaves(tree), leaf_names(tree), strict=True):
        spec = jax.typeof(leaf).sharding.spec if isinstance(leaf, jax.Array) else ()
        if any(entry is not None for entry in spec):
            raise ValueError(
                f"{what}{f' {name!r}' if name else ''} must be on one device, replicated, or "
                "sharded over a mesh of jax.sharding.AxisType.Auto, got an array whose type is "
                f"sharded, {spec}: bring it to one device, jax.device_put(x, jax.devices()[0]), or "
                "make the mesh with axis_types=(jax.sharding.AxisType.Auto,)"
            )
