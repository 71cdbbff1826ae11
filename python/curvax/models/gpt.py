"""A byte-level GPT in plain JAX: pre-norm, learned positions, causal attention, untied head.

`gpt.npz` holds trained weights and a batch, `gpt.json` what they were made with;
`examples/train_demo_gpt.py` makes both files.
"""

import importlib.resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.losses import SoftmaxCrossEntropy
from curvax.operators.model import Model
from curvax.program import present

Params = dict[str, Any]

VOCAB = 256
CONTEXT = 64
WIDTH = 128
HEADS = 4
LAYERS = 4


def init(key: Array, *, layers: int = LAYERS, width: int = WIDTH, context: int = CONTEXT) -> Params:
    """Draw initial parameters, GPT-2 style.

    Args:
        key: a PRNG key.
        layers: number of transformer blocks.
        width: residual width D, a multiple of `HEADS`.
        context: longest sequence T.

    Returns:
        A pytree of float32 arrays: `embed (256, D)`, `position (T, D)`, `blocks` (a list of
        dicts), `norm`, `head (D, 256)`.
    """
    keys = iter(jax.random.split(key, 4 * layers + 3))

    def normal(shape: tuple[int, ...], scale: float = 0.02) -> Array:
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    def norm() -> Params:
        return {"scale": jnp.ones(width, jnp.float32), "bias": jnp.zeros(width, jnp.float32)}

    residual = 0.02 / (2 * layers) ** 0.5
    return {
        "embed": normal((VOCAB, width)),
        "position": normal((context, width)),
        "blocks": [
            {
                "norm1": norm(),
                "attn": {
                    "qkv": normal((width, 3 * width)),
                    "out": normal((width, width), residual),
                },
                "norm2": norm(),
                "mlp": {
                    "up": normal((width, 4 * width)),
                    "down": normal((4 * width, width), residual),
                },
            }
            for _ in range(layers)
        ],
        "norm": norm(),
        "head": normal((width, VOCAB)),
    }


def _layer_norm(x: Array, p: Params) -> Array:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    out: Array = centred * jax.lax.rsqrt(variance + 1e-5) * p["scale"] + p["bias"]
    return out


def _attention(x: Array, p: Params) -> Array:
    batch, length, width = x.shape
    qkv = (x @ p["qkv"]).reshape(batch, length, 3, HEADS, width // HEADS)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // HEADS) ** -0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    out: Array = mixed.reshape(batch, length, width) @ p["out"]
    return out


def _mlp(x: Array, p: Params) -> Array:
    out: Array = jax.nn.gelu(x @ p["up"]) @ p["down"]
    return out


def forward(params: Params, tokens: Array) -> Array:
    """Logits `(B, T, 256)` of integer `tokens (B, T)`."""
    x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
    for block in params["blocks"]:
        x = x + _attention(_layer_norm(x, block["norm1"]), block["attn"])
        x = x + _mlp(_layer_norm(x, block["norm2"]), block["mlp"])
    logits: Array = _layer_norm(x, params["norm"]) @ params["head"]
    return logits


def loss(params: Params, batch: Array) -> Array:
    """Mean next-byte cross-entropy (nats) of `batch (B, T+1)`, integers 0-255."""
    tokens = batch.astype(jnp.int32)
    logits = forward(params, tokens[:, :-1])
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def load() -> tuple[Params, Array]:
    """Load the trained parameters and the batch.

    Returns:
        The parameters, float32 in the structure of `init`, and the batch, uint8 `(16, 65)`.

    Raises:
        ValueError: JAX has no device of the platforms that it was told to use.
    """
    present()
    file = importlib.resources.files(__package__).joinpath("gpt.npz")
    with file.open("rb") as stream, np.load(stream) as stored:
        flat, batch = stored["parameters"], stored["batch"]
    # Traced, not run: the structure is wanted, not random numbers.
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda: init(jax.random.key(0))))
    borders = np.cumsum([leaf.size for leaf in shapes])[:-1]
    parts = np.split(flat, borders)
    leaves = [
        jnp.asarray(part.reshape(leaf.shape).astype(leaf.dtype))
        for part, leaf in zip(parts, shapes, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves), jnp.asarray(batch)


def make_problem() -> tuple[Model, Array]:
    """The trained byte-level GPT on 16 sequences of English, 1,024 predicted bytes; nats per byte.

    Returns:
        The model, whose outputs are logits, and its batch.
    """
    params, batch = load()

    def outputs(params: Params, batch: Array) -> Array:
        return forward(params, batch[:, :-1])

    return Model(params, outputs, SoftmaxCrossEntropy(labels=lambda batch: batch[:, 1:])), batch
