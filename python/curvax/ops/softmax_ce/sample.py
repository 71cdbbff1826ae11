"""Labels drawn from the softmax of rows of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from curvax.ops.softmax_ce.options import Options, compute_dtype


def draw_labels(logits: Array, labels: Array, keys: Array, options: Options) -> Array:
    """One label per row, of probability `softmax(z)`, `z` the logits after the cap.

    The largest of `z` plus independent Gumbel noise has these probabilities (Maddison et al. 2014,
    "A* sampling", section 2).

    Args:
        logits: `(N, V)`.
        labels: `(N,)` int32; a row whose label is to be ignored keeps it.
        keys: `(N,)` keys: a row's label depends on its own alone.
        options: their softcap and `ignore_index` count.
    """
    dtype = compute_dtype(logits.dtype)
    z = logits.astype(dtype)
    if options.softcap > 0:
        z = options.softcap * jnp.tanh(z / options.softcap)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, z.shape[1:], dtype))(keys)
    drawn = jnp.argmax(z + noise, axis=1).astype(labels.dtype)
    return jnp.where(labels == options.ignore_index, labels, drawn)
