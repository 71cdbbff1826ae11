"""Products with a convolutional network over microbatches, beside those over one batch.

    python -m benchmarks.products.microbatches [--repeats 3] [--json FILE]

A ResNet-like network of 64 images of 32 x 32: one batch, and 4 microbatches in a loop of one
program, with the residuals kept and recomputed, timed in turn in a process each time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.lib.compiled import median_seconds
from benchmarks.lib.processes import main, run_case

import curvax as cx
from curvax.operators.checked_product import compiled_product

IMAGES, PART = 64, 16
WAYS = {"linearised": True, "recomputed": False}


def _convolve(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    order = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=order)


def _forward(params: Any, images: jax.Array) -> jax.Array:
    x = jax.nn.silu(_convolve(images, params["stem"]))
    for block in params["blocks"]:
        y = _convolve(jax.nn.silu(_convolve(x, block["down"], 2)), block["same"])
        x = jax.nn.silu(y + _convolve(x, block["skip"], 2))
    return x.mean((2, 3)) @ params["head"]


def _loss(params: Any, batch: Any) -> jax.Array:
    return cx.losses.softmax_cross_entropy(_forward(params, batch[0]), batch[1])


def _problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> jax.Array:
        scale = np.prod(shape[1:]) ** -0.5
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    blocks = [
        {"down": weights(b, a, 3, 3), "same": weights(b, b, 3, 3), "skip": weights(b, a, 1, 1)}
        for a, b in ((16, 32), (32, 64))
    ]
    params = {"stem": weights(16, 3, 3, 3), "blocks": blocks, "head": weights(64, 10)}
    images = jnp.asarray(rng.standard_normal((IMAGES, 3, 32, 32)), jnp.float32)
    return params, (images, jnp.asarray(rng.integers(0, 10, IMAGES)))


def _products() -> dict[str, float]:
    params, batch = _problem()
    programs = {}
    for way, linearize in WAYS.items():
        for size in (None, PART):
            op = cx.hessian(_loss, params, batch, linearize=linearize, microbatch_size=size)
            v = jax.random.normal(jax.random.key(0), (1, op.shape[0]))
            name = f"{way}, {'one batch' if size is None else 'microbatches'}"
            programs[name] = lambda op=op, v=v: compiled_product(op, v)
    with cx.keep_memory():
        return median_seconds(programs, 9)


CASES = {"products": lambda number, seed: _products()}


def compare(repeats: int) -> dict[str, Any]:
    """Ratios of times, medians over the processes."""
    rounds = [
        run_case("benchmarks.products.microbatches", "products", 0, seed) for seed in range(repeats)
    ]

    def ratio(way: str) -> float:
        pairs = [r[f"{way}, microbatches"] / r[f"{way}, one batch"] for r in rounds]
        return float(np.median(pairs))

    ratios = {f"{way}: microbatches / one batch (target <= 1.2)": ratio(way) for way in WAYS}
    return {"rounds": rounds, "ratios": ratios}


if __name__ == "__main__":
    main(__doc__ or "", CASES, compare, repeats=3)
