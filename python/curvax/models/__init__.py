"""The trained byte-level GPT and the batch that `curvax demo` analyses.

`gpt.py` is the model, `gpt.npz` its weights and the batch, `gpt.json` what they were made with;
`examples/train_demo_gpt.py` makes both files.
"""

import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np

from curvax.models import gpt
from curvax.program import present

__all__ = ["gpt", "load"]


def load() -> tuple[gpt.Params, jax.Array]:
    """Load the demo's parameters and batch.

    Returns:
        The parameters, float32 in the structure of `gpt.init`, and the batch, uint8 `(16, 65)`.

    Raises:
        ValueError: JAX has no device of the platforms that it was told to use.
    """
    present()
    file = importlib.resources.files(__name__).joinpath("gpt.npz")
    with file.open("rb") as stream, np.load(stream) as stored:
        flat, batch = stored["parameters"], stored["batch"]
    # Traced, not run: the structure is wanted, not random numbers.
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda: gpt.init(jax.random.key(0))))
    borders = np.cumsum([leaf.size for leaf in shapes])[:-1]
    parts = np.split(flat, borders)
    leaves = [
        jnp.asarray(part.reshape(leaf.shape).astype(leaf.dtype))
        for part, leaf in zip(parts, shapes, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves), jnp.asarray(batch)
