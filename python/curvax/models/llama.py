"""A Llama decoder in plain JAX: RMSNorm, RoPE, grouped-query attention, SwiGLU, tied head.

It comes without weights; `smollm2` has some.
"""

from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.losses import LinearCrossEntropy, linear_cross_entropy
from curvax.nn import dot_product_attention
from curvax.operators.model import Model
from curvax.typing import PyTree

Params: TypeAlias = dict[str, PyTree]


@dataclass(frozen=True)
class Config:
    """The sizes of a model; the size of a head is `width // heads`.

    Attributes:
        vocab: number of token ids V.
        width: residual width D, an even multiple of `heads`.
        layers: number of blocks L.
        heads: number of query heads, a multiple of `kv_heads`.
        kv_heads: number of key and value heads; each serves `heads // kv_heads` query heads.
        hidden: width F of the gated layer.
        context: longest sequence.
        norm_eps: what RMSNorm adds to the mean square.
        rope_theta: base of the wavelengths of the rotary positions.

    Raises:
        ValueError: a size is not positive, or one that must divide another does not.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    context: int
    norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if not size > 0:
                raise ValueError(f"{name} must be positive, got {size}; give a positive number")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}; "
                f"choose a divisor of {self.heads}"
            )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads = {2 * self.heads}, as RoPE rotates pairs "
                f"within each head, got {self.width}; change width or heads"
            )


def init(key: Array, config: Config) -> Params:
    """Draw initial parameters: normal of scale 0.02, less for what is added to the residual.

    Args:
        key: a PRNG key.
        config: the sizes.

    Returns:
        A pytree of float32 arrays: `embed (V, D)`, `layers` (each array with all L layers on its
        leading axis, matrices as `(L, in, out)`) and `norm (D,)`.
    """
    keys = iter(jax.random.split(key, 8))
    layers, width, hidden = config.layers, config.width, config.hidden
    kv_width = config.kv_heads * (width // config.heads)
    residual = 0.02 / (2 * layers) ** 0.5

    def normal(*shape: int, scale: float = 0.02) -> Array:
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    return {
        "embed": normal(config.vocab, width),
        "layers": {
            "norm1": jnp.ones((layers, width), jnp.float32),
            "attn": {
                "q": normal(layers, width, width),
                "k": normal(layers, width, kv_width),
                "v": normal(layers, width, kv_width),
                "out": normal(layers, width, width, scale=residual),
            },
            "norm2": jnp.ones((layers, width), jnp.float32),
            "mlp": {
                "gate": normal(layers, width, hidden),
                "up": normal(layers, width, hidden),
                "down": normal(layers, hidden, width, scale=residual),
            },
        },
        "norm": jnp.ones(width, jnp.float32),
    }


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _rope_tables(length: int, head: int, theta: float, dtype: jnp.dtype) -> tuple[Array, Array]:
    # In float64 on the host: float32 angles of late positions would be off by 1e-3.
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, head, 2) / head))
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    # Feature i is paired with feature i + head / 2. The tables broadcast over the heads.
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(x: Array, p: Params, rope: tuple[Array, Array], config: Config) -> Array:
    batch, length, width = x.shape
    head = width // config.heads
    q = _rotate((x @ p["q"]).reshape(batch, length, config.heads, head), *rope)
    k = _rotate((x @ p["k"]).reshape(batch, length, config.kv_heads, head), *rope)
    v = (x @ p["v"]).reshape(batch, length, config.kv_heads, head)
    mixed = dot_product_attention(q, k, v, is_causal=True)
    out: Array = mixed.reshape(batch, length, width) @ p["out"]
    return out


def _mlp(x: Array, p: Params) -> Array:
    out: Array = (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    return out


def _check_tokens(tokens: Array, context: int) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "tokens must be integers of shape (batch, length), got "
            f"{tokens.dtype} of shape {tokens.shape}; add a batch axis, or convert to int32"
        )
    if tokens.shape[1] > context:
        raise ValueError(
            f"tokens must have at most config.context = {context} columns, "
            f"got {tokens.shape[1]}; shorten the sequences"
        )


def hidden(params: Params, tokens: Array, config: Config) -> Array:
    """The states that the head reads, after the last norm.

    Args:
        params: as made by `init`, of any one floating dtype; it is computed in that dtype.
        tokens: integers `(B, T)`, T at most `config.context`. That they lie in `[0, vocab)` is
            not checked.
        config: the sizes.

    Returns:
        `(B, T, width)`, in the dtype of the parameters.

    Raises:
        ValueError: `tokens` is not integer, not a matrix, or too long.
    """
    _check_tokens(tokens, config.context)
    x: Array = params["embed"][tokens]
    head = config.width // config.heads
    rope = _rope_tables(tokens.shape[1], head, config.rope_theta, x.dtype)

    def block(x: Array, p: Params) -> tuple[Array, None]:
        x = x + _attention(_rms_norm(x, p["norm1"], config.norm_eps), p["attn"], rope, config)
        return x + _mlp(_rms_norm(x, p["norm2"], config.norm_eps), p["mlp"]), None

    x, _ = jax.lax.scan(block, x, params["layers"])
    return _rms_norm(x, params["norm"], config.norm_eps)


def logits(params: Params, tokens: Array, config: Config) -> Array:
    """Next-token logits `(B, T, vocab)`: `hidden` times the transposed embedding.

    Arguments and errors are those of `hidden`.
    """
    out: Array = hidden(params, tokens, config) @ params["embed"].T
    return out


def outputs(params: Params, tokens: Array, config: Config) -> tuple[Array, Array]:
    """The model's outputs as `losses.LinearCrossEntropy` takes them: hidden states and head.

    Arguments and errors are those of `hidden`.
    """
    return hidden(params, tokens, config), params["embed"]


def loss(params: Params, tokens: Array, config: Config) -> Array:
    """Mean next-token cross entropy (nats) of `tokens (B, T + 1)`, without an array of logits.

    Other arguments and errors are those of `hidden`.
    """
    states, head = outputs(params, tokens[:, :-1], config)
    mean: Array = linear_cross_entropy(states, head, tokens[:, 1:])
    return mean


def model(params: Params, config: Config) -> Model:
    """The model and its mean next-token cross entropy (nats) of `tokens (B, T + 1)`.

    Args:
        params: as made by `init`.
        config: the sizes.
    """

    def inputs(params: Params, tokens: Array) -> tuple[Array, Array]:
        return outputs(params, tokens[:, :-1], config)

    return Model(params, inputs, LinearCrossEntropy(labels=lambda tokens: tokens[:, 1:]))


def make_problem(
    layers: int = 2, width: int = 64, vocab: int = 1000, tokens: int = 64
) -> tuple[Model, Array]:
    """A Llama with random weights on random tokens; nats per token.

    Args:
        layers: number of blocks.
        width: residual width, a multiple of 8; four heads share it, and two keys and values.
        vocab: number of token ids.
        tokens: length of the one sequence; each token but the first is predicted.

    Returns:
        The model and its batch, int32 `(1, tokens)`.
    """
    config = Config(
        vocab=vocab,
        width=width,
        layers=layers,
        heads=4,
        kv_heads=2,
        hidden=3 * width,
        context=tokens,
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    weights, text = jax.random.split(jax.random.key(0))
    return model(init(weights, config), config), jax.random.randint(text, (1, tokens), 0, vocab)
