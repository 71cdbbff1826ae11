"""Cross entropies as functions of the same slots: ours, and plain JAX in float64 for the truth."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import losses

EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Slots `(hidden, head, bias)` with tangents, and what is fixed."""

    slots: tuple[np.ndarray, ...]
    tangents: tuple[np.ndarray, ...]
    labels: np.ndarray
    weights: np.ndarray
    options: dict[str, Any]

    def as_dtype(self, dtype: str) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        return tuple(
            tuple(jnp.asarray(x, dtype) for x in group) for group in (self.slots, self.tangents)
        )

    def ours(self, kind: str):
        """The loss, a function of the slots; `kind` is softmax or linear."""
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        fixed = dict(weights=jnp.asarray(self.weights, dtype), **self.options)

        def softmax(slots):
            hidden, head, bias = slots
            return losses.softmax_cross_entropy(hidden @ head.T + bias[None], self.labels, **fixed)

        def linear(slots):
            hidden, head, bias = slots
            return losses.linear_cross_entropy(
                hidden, head, self.labels, bias=bias, chunk=4, **fixed
            )

        return {"softmax": softmax, "linear": linear}[kind]

    def truth(self, slots):
        """The same in plain JAX; to be called on float64 arrays."""
        hidden, head, bias = slots
        vocab, options = head.shape[0], self.options
        cap, eps = options.get("softcap"), options.get("label_smoothing", 0.0)
        z = hidden @ head.T + bias[None]
        z = z if cap is None else cap * jnp.tanh(z / cap)
        kept = self.labels != options.get("ignore_index", -100)
        index = jnp.asarray(np.where(kept, self.labels, 0))
        lse = jax.nn.logsumexp(z, axis=1)
        picked = jnp.take_along_axis(z, index[:, None], axis=1)[:, 0]
        # Without smoothing the sum over the vocabulary is left out: it may be -inf.
        spread = eps / vocab * jnp.sum(z, axis=1) if eps else 0.0
        row = lse - (1 - eps) * picked - spread + options.get("z_loss", 0.0) * lse**2
        share = jnp.asarray(np.where(kept, self.weights, 0.0))
        return jnp.sum(jnp.where(share > 0, share * row, 0.0)) / jnp.sum(share)


def make_problem(rng, rows=11, width=5, vocab=37, masked_classes=0, **options) -> Problem:
    shapes = [(rows, width), (vocab, width), (vocab,)]
    slots = [rng.normal(size=shape) for shape in shapes]
    tangents = [rng.normal(size=shape) for shape in shapes]
    labels = rng.integers(0, vocab - masked_classes, rows).astype(np.int32)
    labels[1] = options.get("ignore_index", -100)
    weights = rng.uniform(0.1, 2, rows)
    weights[2] = 0
    if masked_classes:
        slots[2][-masked_classes:] = -np.inf
        tangents[2][-masked_classes:] = 0
    # What every dtype can hold, so that inputs are the same for all.
    exact = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (*slots, *tangents)]
    return Problem(tuple(exact[:3]), tuple(exact[3:]), labels, weights, options)


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "z_loss": {"z_loss": 1e-2},
    "smoothing": {"label_smoothing": 0.1},
    "ignore_index": {"ignore_index": 4},
    "everything": {
        "softcap": 4.0,
        "z_loss": 1e-2,
        "label_smoothing": 0.1,
        "ignore_index": 3,
    },
}


def float64(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def assert_close(got, want, tolerance, scale=None):
    """Every array within `tolerance` of the largest entry of any, or of `scale`."""
    got, want = float64(got), float64(want)
    assert [x.shape for x in got] == [x.shape for x in want]
    scale = scale or max(np.abs(x).max() for x in want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert np.abs(a - b).max() <= tolerance * scale, (
            f"array {i}: error {np.abs(a - b).max() / scale:.1e} of {tolerance:.1e}"
        )
