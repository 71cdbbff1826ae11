"""Cross entropy through a linear head, in chunks of rows, with no array of N×V elements.

With hidden states X `(N, D)`, head W `(V, D)`, bias c `(V,)` and tangents Xd, Wd, cd, per chunk of
rows (equations: Wijmans et al. 2024 for the first order; differentiated once more here):

    A  = X Wᵀ + c            Ad = Xd Wᵀ + X Wdᵀ + cd          logits (C, V) and their tangents
    G, Gd = the gradient and Hessian product of the row losses in A, along Ad  (softmax_ce)
    dX = Gd W + G Wd         dW += Gdᵀ X + Gᵀ Xd              dc += Gdᵀ 1

The Gauss-Newton product drops the terms in G. The product with the outer products of the gradients
of samples, groups of rows, takes two sweeps, as a sample's rows may be in several chunks:

    c = Σ_rows of the sample <G, Ad>;    dX = c ⊙ (G W)    dW += Gᵀ (c ⊙ X)    dc += Gᵀ c

In units of one product of X and W: 8 for a Hessian product with the gradient in X, 7 without,
`6 + 1/b` per tangent for a block of b; 5 for Gauss-Newton, 3 for the gradient, `3 + 3/b` per
tangent for outer products. Chunks of rows keep the products large.

These products are those of a layer of the user's model, in the user's precision (on a CPU in that
of the operands). The sums along the vocabulary that belong to the rule are in full precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike

from curvax.losses.softmax_ce import Spec, draw_labels, hessian_products, weighted
from curvax.ops import softmax_ce
from curvax.ops.manual_axes import zeros_beside
from curvax.ops.matmul_sum import matmul_sum
from curvax.program import default_platform
from curvax.second_order import ScalarLoss, TwiceDifferentiable

# Rows of a chunk, and bytes of its logits and their tangents: enough for products at full speed.
_MIN_ROWS = 16
_ON_CPU = (256, 1 << 29)
_ON_DEVICE = (2048, 1 << 31)


def _setting() -> str | None:
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined,no-any-return]


@dataclasses.dataclass(frozen=True)
class LinearSpec(Spec):
    """Static options, besides those of the row losses.

    Attributes:
        chunk: rows per chunk; None chooses.
        samples: None, or the number of samples, groups of as many rows each: products are then
            those with the sum over samples of the outer product of the gradient with itself, in
            place of the Hessian.
        precision: of the products with the head, as for `matmul_sum`: JAX's setting where this is
            made. None is JAX's default.
    """

    chunk: int | None = None
    samples: int | None = None
    precision: PrecisionLike = dataclasses.field(default_factory=_setting)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Operands in the dtype that is computed in, padded to whole chunks."""

    hidden: Array
    head: Array
    bias: Array | None
    labels: Array
    weights: Array
    chunk: int
    given: int
    precision: PrecisionLike

    def sum(self, *terms: tuple[Array, Array], **options: Any) -> Array:
        """Products with the head, added up."""
        return matmul_sum(*terms, precision=self.precision, **options)

    def rows(self, x: Array, i: Array, axis: int = 0) -> Array:
        """Chunk i of an array with the tokens on `axis`."""
        return lax.dynamic_slice_in_dim(x, i * self.chunk, self.chunk, axis)

    def put(self, x: Array, rows: Array, i: Array, axis: int = 0) -> Array:
        """`x` with its chunk i replaced."""
        return lax.dynamic_update_slice_in_dim(x, rows, i * self.chunk, axis)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return zeros_beside(self.hidden, shape, self.hidden.dtype)

    def logits(self, i: Array) -> Array:
        out = self.sum((self.rows(self.hidden, i), self.head), transpose_b=True)
        return out if self.bias is None else out + self.bias[None]

    def losses(self, spec: LinearSpec, i: Array) -> tuple[Array, Array]:
        """Losses of the rows of chunk i, and the gradient of their weighted sum in the logits."""
        losses, _, gradient, _ = softmax_ce.derivatives(
            self.logits(i),
            self.zeros((0, self.chunk, self.head.shape[0])),
            self.rows(self.labels, i),
            self.rows(self.weights, i),
            spec.options,
        )
        return losses, gradient

    def loop(self, body: Callable[[Array, Any], Any], start: Any) -> Any:
        """Fold `body(i, carry)` over the chunks."""
        chunks = self.hidden.shape[0] // self.chunk
        return lax.fori_loop(jnp.int32(0), jnp.int32(chunks), body, start)


def _problem(spec: LinearSpec, slots: Any, data: Any, arrays: int) -> _Problem:
    hidden, head, bias = (*slots, None)[:3]
    labels, weights = data
    dtype, given = weights.dtype, hidden.shape[0]
    chunk = spec.chunk or _automatic_rows(head.shape[0], dtype.itemsize, arrays)
    # Equal chunks: the last one is padded by less than their number of rows.
    chunks = max(-(-given // chunk), 1)
    chunk = max(-(-given // chunks), 1)
    padding = chunks * chunk - given
    ignored = spec.options.ignore_index
    return _Problem(
        _pad(hidden.astype(dtype), padding),
        head.astype(dtype),
        None if bias is None else bias.astype(dtype),
        jnp.pad(labels, (0, padding), constant_values=ignored),
        jnp.pad(weights, (0, padding)),
        chunk,
        given,
        # Not None, for which the setting where the program is compiled would be taken.
        lax.Precision.DEFAULT if spec.precision is None else spec.precision,
    )


def _automatic_rows(vocab: int, itemsize: int, arrays: int) -> int:
    most, budget = _ON_CPU if default_platform() == "cpu" else _ON_DEVICE
    return min(most, max(_MIN_ROWS, budget // (arrays * vocab * itemsize)))


def _pad(x: Array, rows: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, 0)]) if rows else x


def _value(spec: LinearSpec, slots: Any, data: Any) -> Array:
    return _gradient(spec, slots, data)[0]


def _gradient(spec: LinearSpec, slots: Any, data: Any) -> tuple[Array, tuple[Array, ...]]:
    p = _problem(spec, slots, data, arrays=1)
    vocab = p.head.shape[0]
    shapes = ((), p.hidden.shape, p.head.shape, (vocab,))

    def body(i: Array, carry: Any) -> Any:
        total, d_hidden, d_head, d_bias = carry
        losses, g = p.losses(spec, i)
        return (
            total + weighted(losses, p.rows(p.weights, i)),
            p.put(d_hidden, p.sum((g, p.head)), i),
            p.sum((g, p.rows(p.hidden, i)), add_to=d_head, transpose_a=True),
            d_bias + jnp.sum(g, axis=0),
        )

    # What is not used of the carry, XLA takes out of the loop.
    total, d_hidden, d_head, d_bias = p.loop(body, tuple(p.zeros(shape) for shape in shapes))
    gradients = (d_hidden[: p.given], d_head, d_bias)
    return total, tuple(g.astype(s.dtype) for g, s in zip(gradients, slots, strict=False))


@dataclasses.dataclass(frozen=True)
class _Tangents:
    """A block of b tangents in the dtype that is computed in, None where they are zero."""

    block: int
    hidden: Array | None
    head: Array | None
    bias: Array | None


def _tangents(p: _Problem, tangents: Any) -> _Tangents:
    hidden, head, bias = (
        None if t is None else t.astype(p.hidden.dtype) for t in (*tangents, None)[:3]
    )
    block = next(t.shape[0] for t in tangents if t is not None)
    if hidden is not None:
        hidden = _pad(hidden, p.hidden.shape[0] - p.given)
    return _Tangents(block, hidden, head, bias)


def _logit_tangents(p: _Problem, t: _Tangents, i: Array) -> Array:
    """`Ad` of chunk i, `(b, C, V)`."""
    terms = []
    if t.hidden is not None:
        terms.append((p.rows(t.hidden, i, axis=1), p.head))
    if t.head is not None:
        terms.append((p.rows(p.hidden, i), t.head))
    if not terms:
        out = p.zeros((t.block, p.chunk, p.head.shape[0]))
    else:
        out = p.sum(*terms, transpose_b=True)
    return out if t.bias is None else out + t.bias[:, None, :]


def _products(
    spec: LinearSpec, slots: Any, data: Any, tangents: Any, wanted: tuple[bool, ...]
) -> tuple[Array, ...]:
    block = next(t.shape[0] for t in tangents if t is not None)
    p = _problem(spec, slots, data, arrays=1 + block)
    t = _tangents(p, tangents)
    sweep = _hessian_sweep if spec.samples is None else _outer_sweep
    out = sweep(spec, p, t)
    out[0] = out[0][:, : p.given]
    return tuple(
        product.astype(slot.dtype)
        for product, slot, asked in zip(out, slots, wanted, strict=False)
        if asked
    )


def _zero_products(p: _Problem, block: int) -> tuple[Array, ...]:
    shapes = (p.hidden.shape, p.head.shape, p.head.shape[:1])
    return tuple(p.zeros((block, *shape)) for shape in shapes)


def _hessian_sweep(spec: LinearSpec, p: _Problem, t: _Tangents) -> list[Array]:
    def body(i: Array, carry: Any) -> Any:
        d_hidden, d_head, d_bias = carry
        z, zd = p.logits(i), _logit_tangents(p, t, i)
        labels, weights = p.rows(p.labels, i), p.rows(p.weights, i)
        g = None
        if spec.gauss_newton:
            gd = hessian_products(z, zd, labels, weights, spec)
        else:
            _, _, g, gd = softmax_ce.derivatives(z, zd, labels, weights, spec.options)
        to_hidden, to_head = [(gd, p.head)], [(gd, p.rows(p.hidden, i))]
        if g is not None and t.head is not None:
            to_hidden.append((g, t.head))
        if g is not None and t.hidden is not None:
            to_head.append((g, p.rows(t.hidden, i, axis=1)))
        return (
            p.put(d_hidden, p.sum(*to_hidden), i, axis=1),
            p.sum(*to_head, add_to=d_head, transpose_a=True),
            d_bias + jnp.sum(gd, axis=1),
        )

    # What is not used of the carry, XLA takes out of the loop.
    return list(p.loop(body, _zero_products(p, t.block)))


def _outer_sweep(spec: LinearSpec, p: _Problem, t: _Tangents) -> list[Array]:
    assert spec.samples is not None

    def slopes(i: Array, carry: Array) -> Array:
        """The derivatives of the rows' weighted losses along the tangents."""
        g, zd = p.losses(spec, i)[1], _logit_tangents(p, t, i)
        along = jnp.einsum("cv,bcv->bc", g, zd, precision=lax.Precision.HIGHEST)
        return p.put(carry, along, i, axis=1)

    per_row = p.loop(slopes, p.zeros((t.block, p.hidden.shape[0])))[:, : p.given]
    per_sample = jnp.sum(per_row.reshape(t.block, spec.samples, -1), axis=2)
    factors = jnp.repeat(per_sample, p.given // spec.samples, axis=1)
    factors = jnp.pad(factors, ((0, 0), (0, p.hidden.shape[0] - p.given)))

    def body(i: Array, carry: Any) -> Any:
        d_hidden, d_head, d_bias = carry
        g, c = p.losses(spec, i)[1], p.rows(factors, i, axis=1)
        scaled = c[:, :, None] * p.rows(p.hidden, i)[None]
        return (
            p.put(d_hidden, c[:, :, None] * p.sum((g, p.head))[None], i, axis=1),
            p.sum((g, scaled), add_to=d_head, transpose_a=True),
            d_bias + jnp.matmul(c, g, precision=lax.Precision.HIGHEST),
        )

    return list(p.loop(body, _zero_products(p, t.block)))


def linear_ce_draw(spec: LinearSpec, slots: Any, data: Any, keys: Array) -> Array:
    """Labels `(N,)` drawn from the model.

    Args:
        spec: static options.
        slots: as for `linear_ce_total`.
        data: as for `linear_ce_total`; labels to be ignored stay.
        keys: `(N,)` keys, one per row.
    """
    p = _problem(spec, slots, data, arrays=2)  # logits and noise
    impl, words = jax.random.key_impl(keys), jax.random.key_data(keys)
    words = _pad(words, p.hidden.shape[0] - p.given)

    def body(i: Array, labels: Array) -> Array:
        own = jax.random.wrap_key_data(p.rows(words, i), impl=impl)
        drawn = draw_labels(p.logits(i), p.rows(labels, i), own, spec.options)
        return p.put(labels, drawn, i)

    return p.loop(body, p.labels)[: p.given]


linear_ce_total = TwiceDifferentiable(
    ScalarLoss("linear_cross_entropy", _value, _gradient, _products)
)
