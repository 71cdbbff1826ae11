"""Top Hessian eigenpairs of a GPT-2-shaped model, end to end, trained a little on words.

The tokens are the words of this repository's own text, hashed into the vocabulary: there is no
network where this runs. Training moves the parameters away from their start, where the spectrum has
little structure; its products have JAX's default precision, those of the solve the one asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.gpu.shape import SMALL, Shape

import curvax as cx

ROOT = Path(__file__).parents[2]
BEGUN = time.perf_counter()


# Seconds per product of SMALL.
TARGETS = {"highest": 0.36, "bf16x3": 0.2}


def init(shape: Shape) -> Any:
    """Parameters with the layers stacked, tied embeddings."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    d, count = shape.width, shape.layers

    def normal(size: tuple[int, ...], scale: float = 0.02) -> Any:
        return scale * jax.random.normal(next(keys), size, jnp.float32)

    residual = 0.02 / (2 * count) ** 0.5
    return {
        "embed": normal((shape.vocab, d)),
        "position": normal((shape.context, d)),
        "blocks": {
            "norm1": jnp.ones((count, d)),
            "norm2": jnp.ones((count, d)),
            "qkv": normal((count, d, 3 * d)),
            "out": normal((count, d, d), residual),
            "up": normal((count, d, 4 * d)),
            "down": normal((count, 4 * d, d), residual),
        },
        "norm": jnp.ones(d),
    }


def _norm(x: Any, scale: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale


def make_loss(shape: Shape) -> Any:
    """Mean cross entropy of the next token.

    Of each layer the products with weights are kept for the way back, not the T x T arrays: to
    compute all of it again would cost half as many products more.
    """

    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        prevent_cse=False,  # the loop over layers does
    )
    def block(x: Any, p: Any) -> Any:
        batch, length, d = x.shape
        qkv = (_norm(x, p["norm1"]) @ p["qkv"]).reshape(batch, length, 3, shape.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // shape.heads) ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, d)
        x = x + mixed @ p["out"]
        return x + jax.nn.gelu(_norm(x, p["norm2"]) @ p["up"]) @ p["down"], None

    def loss(params: Any, tokens: Any) -> Any:
        x = params["embed"][tokens[:, :-1]] + params["position"][: tokens.shape[1] - 1]
        x, _ = jax.lax.scan(block, x, params["blocks"])
        hidden = _norm(x, params["norm"])
        return cx.losses.linear_cross_entropy(hidden, params["embed"], tokens[:, 1:])

    return loss


def tokens(shape: Shape, count: int) -> Any:
    """`count` batches `(batch, context + 1)` of hashed words."""
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("python/**/*.py"), *ROOT.glob("*.md")])
    words = re.findall(r"\w+|[^\w\s]", "\n".join(f.read_text() for f in files))
    ids = np.array([zlib.crc32(word.encode()) % shape.vocab for word in words], np.int32)
    need = count * shape.batch * (shape.context + 1)
    return jnp.asarray(np.resize(ids, need).reshape(count, shape.batch, shape.context + 1))


def train(loss: Any, params: Any, batches: Any) -> Any:
    """Some steps of Adam."""

    def step(carry: Any, batch: Any) -> Any:
        params, m, v, t = carry
        value, grad = jax.value_and_grad(loss)(params, batch)
        m = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, m, grad)
        v = jax.tree.map(lambda a, g: 0.99 * a + 0.01 * g * g, v, grad)
        rate = 3e-4 * jnp.sqrt(1 - 0.99**t) / (1 - 0.9**t)
        params = jax.tree.map(lambda p, a, b: p - rate * a / (jnp.sqrt(b) + 1e-8), params, m, v)
        return (params, m, v, t + 1), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = (params, zeros, jax.tree.map(jnp.zeros_like, params), jnp.float32(1))
    (params, *_), values = jax.jit(lambda c, b: jax.lax.scan(step, c, b), donate_argnums=0)(
        start, batches
    )
    return params, np.asarray(values)


def _say(what: str) -> None:
    """So that a run that is cut leaves how far it came."""
    print(f"{time.perf_counter() - BEGUN:.1f} s: {what}", file=sys.stderr)


def _solve(loss: Any, params: Any, batch: Any, shape: Shape, precision: str) -> Any:
    operator = cx.hessian(loss, params, batch, precision=precision)
    _say("operator")
    return cx.eigsh(
        operator,
        shape.pairs,
        tol=1e-3,
        seed=0,
        basis_dtype=shape.basis_dtype,
        max_basis=shape.max_basis,
        callback=lambda p: _say(f"{p.matvecs} products, {p.converged} of {p.k} pairs"),
    )


def run(shape: Shape, precision: str) -> dict[str, Any]:
    """Seconds, share of the products, and peak memory of the device."""
    loss = make_loss(shape)
    batches = tokens(shape, max(shape.steps, 1))
    params, values = train(loss, init(shape), batches)
    _say("trained")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    start = time.perf_counter()
    result = _solve(loss, params, batches[0], shape, precision)
    total = time.perf_counter() - start
    stats = jax.devices()[0].memory_stats() or {}
    products = result.seconds["products"] + result.seconds["verification"]
    out = {
        "parameters": count,
        "precision": precision,
        "training_loss": [float(values[0]), float(values[-1])],
        "seconds": total,
        "parts": dict(result.seconds),
        "seconds_per_product": result.seconds["products"] / result.num_matvecs,
        "share_of_products": products / (total - result.seconds["compile"]),
        "matvecs": [result.num_matvecs, result.num_verification],
        "block_size": result.block_size,
        "eigenvalues": [float(x) for x in result.eigenvalues],
        "relative_residuals": [
            float(x) for x in result.residuals / np.abs(result.eigenvalues).max()
        ],
        "noise": float(result.noise),
        "all_converged": bool(result.all_converged),
        "peak_device_GB": stats.get("peak_bytes_in_use", 0) / 1e9,
    }
    if shape is SMALL:
        out["target_seconds_per_product"] = TARGETS[precision]
    if importlib.util.find_spec("hessian_eigenthings") is None:
        out["hessian-eigenthings"] = "not installed"
    elif shape is SMALL and precision == "highest":
        from benchmarks.gpu.gpt_peer import solve

        out["hessian-eigenthings"] = solve(shape, params, batches[0])
    return out
