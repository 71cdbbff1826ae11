"""What the adapters of libraries that run on JAX share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.adapters.adapted import AdaptedModel
from curvax.arrays import to_array
from curvax.filters import leaf_names


class JaxSource:
    """See `curvax.adapters.adapted.Source`; of a library that has no derivatives but JAX's."""

    def __init__(
        self, framework: str, call: Callable[[Any], Any], loss: Callable[[Any, Any], Any]
    ) -> None:
        self.framework = framework
        self.call = call
        self.loss = loss

    def evaluate(self, batch: Any) -> tuple[Any, float]:
        """See `Source`."""
        outputs = self.call(batch)
        loss = self.loss(outputs, batch)
        mean = loss[0] if isinstance(loss, tuple) else loss
        return jax.tree.map(np.asarray, outputs), float(mean)

    def derivatives(self, batch: Any, vector: Mapping[str, Any]) -> None:
        """See `Source`."""


def adapt(
    source: JaxSource,
    params: Any,
    forward: Callable[[Any, Any], Any],
    example: Any,
    name_map: Mapping[str, str] | None = None,
) -> AdaptedModel:
    """The model of a library that runs on JAX, compared on `example` if there is one.

    Raises:
        TypeError: the loss is not callable.
        ValueError: no parameters, or one that is NaN or infinite.
    """
    names = leaf_names(params)
    if not names:
        raise ValueError(f"the {source.framework} model must have parameters, got none")
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        if not bool(jnp.isfinite(leaf).all()):
            raise ValueError(
                f"parameter {name!r} is not finite: {int((~jnp.isfinite(leaf)).sum())} of "
                f"{leaf.size} entries are NaN or infinite. Check the checkpoint"
            )
    model = AdaptedModel(
        params,
        forward,
        source.loss,
        name_map or {name: name for name in names},
        source=source,
        convert=lambda batch: jax.tree.map(lambda x: to_array(x, "an array of the batch"), batch),
        hint=" Does the model draw random numbers, or change its state in a call?",
    )
    if example is not None:
        model.verify(example)
    return model
