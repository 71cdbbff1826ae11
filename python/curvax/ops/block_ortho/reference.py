"""The same in plain JAX, for any platform and as the yardstick of the kernels.

Slower in two ways: rows that are not used are multiplied by zero, and a pass reads the basis twice.
The rules are those of the kernels, which common/block_ortho_pass.h explains, and so are the
constants but for one: measure, factorise with a floor, replace rounding noise.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax.ops.block_ortho.arguments import Arguments
from curvax.ops.dtypes import compute_dtype

_MAX_PASSES = 12
_FINAL_DEVIATION = 1e-2
_PANEL = 512
# The smallest squared norm, relative to the column's, that a measurement resolves. For float32 the
# kernels have 1e-7; here, where XLA sums a panel in an order of its own and, without x64, the small
# matrices are float32 too, columns in the span of 1 to 64 rows of 100 to 1e5 elements have measured
# up to 9e-7. A column between the two may take a pass more or less.
_PIVOT_FLOOR = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _inner(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``a @ b.T``, summed in panels whose sums are added up in ``dtype``."""
    n = a.shape[1]
    whole = n // _PANEL * _PANEL
    total = _dot(a[:, whole:], b[:, whole:].T).astype(dtype)
    if whole == 0:
        return total
    parts = jnp.einsum(
        "ipk,jpk->pij",
        a[:, :whole].reshape(a.shape[0], -1, _PANEL),
        b[:, :whole].reshape(b.shape[0], -1, _PANEL),
        precision=lax.Precision.HIGHEST,
    )
    return total + jnp.sum(parts.astype(dtype), axis=0)


class _State(NamedTuple):
    w: jax.Array  # (b, n)
    c: jax.Array  # (rows, b): block = c^T q + s^T w
    s: jax.Array  # (b, b)
    initial: jax.Array  # (b,): norm when the column started, -1: not measured
    surviving: jax.Array  # (b,): product of its pivots since
    random: jax.Array  # (b,): whether it has been replaced
    passes: jax.Array
    deviation: jax.Array
    done: jax.Array
    key: jax.Array


class _Pivots(NamedTuple):
    r: jax.Array  # (b, b): upper triangular in `order`
    dying: jax.Array  # (b,): columns that are only rounding noise
    complete: jax.Array  # whether every pivot was resolved


def _factorise(
    gram: jax.Array,
    square: jax.Array,
    floor: jax.Array,
    surviving: jax.Array,
    limit: jax.Array,
) -> _Pivots:
    """Cholesky factor of ``gram``; unresolved pivots are raised, columns below `limit` marked."""
    b = gram.shape[0]
    columns = jnp.arange(b)

    def step(p: jax.Array, carry: _Pivots) -> _Pivots:
        r, dying, complete = carry
        above = r[:, p]
        pivot = gram[p, p] - jnp.sum(above * above)
        norm = jnp.sqrt(jnp.maximum(pivot, floor[p]))
        dies = surviving[p] * norm <= limit[p]
        resolved = (pivot > floor[p]) & ~dies
        row = (gram[p] - _dot(above, r)) / norm
        row = jnp.where((columns > p) & resolved, row, jnp.zeros_like(row))
        row = row.at[p].set(jnp.where(dies, jnp.ones_like(norm), norm))
        return _Pivots(r.at[p].set(row), dying.at[p].set(dies), complete & resolved)

    start = _Pivots(jnp.zeros_like(gram), square < 0, jnp.asarray(True))
    return lax.fori_loop(0, b, step, start)


def _inverse(r: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(r, jnp.eye(r.shape[0], dtype=r.dtype))


def _deviation(c1: jax.Array, gram: jax.Array, norm: jax.Array) -> jax.Array:
    """Departure from orthonormality of the columns scaled to norm 1; 1 if one of them is zero."""
    b = gram.shape[0]
    safe = jnp.where(norm == 0, jnp.ones_like(norm), norm)
    cross = jnp.max(jnp.abs(c1) / safe[None, :])
    within = jnp.abs(gram) / (safe[:, None] * safe[None, :])
    within = jnp.max(jnp.where(jnp.eye(b, dtype=bool), jnp.zeros_like(within), within))
    return jnp.where(jnp.any(norm == 0), jnp.ones_like(cross), jnp.maximum(cross, within))


def _one_pass(
    state: _State, q: jax.Array, floor: float, noise: jax.Array, lazy_below: float
) -> _State:
    w, small = state.w, state.s.dtype
    b = w.shape[0]
    c1 = _inner(q, w, small)
    gram = _inner(w, w, small)
    square = jnp.diagonal(gram)
    norm = jnp.sqrt(square)
    deviation = _deviation(c1, gram, norm)
    initial = jnp.where(state.initial < 0, norm, state.initial)

    order = jnp.argsort(state.random, stable=True)  # replaced columns last
    inside = (order[:, None], order[None, :])
    pythagorean = gram - _dot(c1.T, c1)
    pivots = _factorise(
        pythagorean[inside],
        square[order],
        floor * square[order],
        state.surviving[order],
        noise * initial[order],
    )
    dying = pivots.dying
    # W' = W mix - Q a with a dying column left alone; then W = Q left + W' r for all columns.
    reduced = jnp.where(dying[None, :], jnp.eye(b, dtype=small), pivots.r)
    mix = _inverse(reduced).astype(w.dtype)
    r = jnp.where(dying[None, :], pivots.r, _inverse(mix.astype(small)))
    left_out = dying | (pivots.complete & (deviation < lazy_below))
    a = jnp.where(left_out[None, :], 0, _dot(c1[:, order], mix.astype(small))).astype(w.dtype)
    left = a.astype(small)
    rest = c1[:, order] - _dot(left, pivots.r)
    left = jnp.where(dying[None, :], rest, left)

    back = jnp.argsort(order)
    r, mix = (x[back[:, None], back[None, :]] for x in (r, mix))
    a, left, dying = a[:, back], left[:, back], dying[back]
    grown = _dot(r, state.s)
    key, draw = jax.random.split(state.key)
    random = jax.random.normal(draw, w.shape, w.dtype) / w.shape[1] ** 0.5
    source = jnp.where(dying[:, None], random, w)
    alive = ~dying
    pivot = jnp.diagonal(pivots.r)[back]
    return _State(
        w=_dot(mix.T, source) - _dot(a.T, q),
        c=state.c + _dot(left, grown),
        s=jnp.where(alive[:, None], grown, jnp.zeros_like(grown)),
        initial=jnp.where(alive, initial, -jnp.ones_like(initial)),
        surviving=jnp.where(alive, state.surviving * pivot, jnp.ones_like(pivot)),
        random=state.random | dying,
        passes=state.passes + 1,
        deviation=deviation,
        done=(pivots.complete & (deviation <= _FINAL_DEVIATION)) | ~jnp.isfinite(deviation),
        key=key,
    )


def _power_of_two_scale(block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows scaled to a largest element in [0.5, 1), and the exponents that undo it."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(block), axis=1))
    # Not by `exp2`, which is not exact at integers.
    return jnp.ldexp(block, -exponent[:, None]), exponent


def orthonormalize_block(given: Arguments) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.orthonormalize_block`."""
    basis, block, used, seed, scale, lazy_below = given
    (rows, columns), (b, n) = basis.shape, block.shape
    x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    small = jnp.dtype(jnp.float64 if x64 else jnp.float32)
    mask = jnp.arange(rows, dtype=used.dtype) < used
    q = basis[:, :n].astype(block.dtype) / scale
    q = jnp.where(mask[:, None], q, jnp.zeros_like(q))
    eps = float(jnp.finfo(block.dtype).eps)
    noise = (8 + jnp.sqrt((used + b).astype(small))) * eps
    floor = _PIVOT_FLOOR[basis.dtype.name]

    finite = jnp.all(jnp.isfinite(block))
    w, exponent = _power_of_two_scale(jnp.where(finite, block, jnp.zeros_like(block)))
    start = _State(
        w=w,
        c=jnp.zeros((rows, b), small),
        s=jnp.eye(b, dtype=small),
        initial=-jnp.ones((b,), small),
        surviving=jnp.ones((b,), small),
        random=jnp.zeros((b,), bool),
        passes=jnp.zeros((), jnp.int32),
        deviation=jnp.zeros((), small),
        done=~finite,
        key=jax.random.wrap_key_data(seed, impl="threefry2x32"),
    )
    end = lax.while_loop(
        lambda state: ~state.done & (state.passes < _MAX_PASSES),
        lambda state: _one_pass(state, q, floor, noise, lazy_below),
        start,
    )
    finite = finite & jnp.isfinite(end.deviation)
    column = jnp.ldexp(jnp.ones((b,), small), exponent)[None, :]
    nan = jnp.where(finite, 0.0, jnp.nan)
    new = (end.w * scale + nan.astype(end.w.dtype)).astype(basis.dtype)
    new = jnp.pad(new, ((0, 0), (0, columns - n)))
    counts = [end.passes, jnp.sum(end.random), end.deviation + nan.astype(small), 0]
    return (
        lax.dynamic_update_slice(basis, new, (used, jnp.zeros_like(used))),
        jnp.where(mask[:, None], end.c * column + nan.astype(small), jnp.zeros((), small)),
        end.s * column + nan.astype(small),
        jnp.stack([jnp.asarray(x).astype(small) for x in counts]),
    )


def rotate_basis(
    basis: jax.Array, rotation: jax.Array, used: jax.Array, kept: jax.Array
) -> jax.Array:
    """See `api.rotate_basis`."""
    index = jnp.arange(basis.shape[0], dtype=used.dtype)
    compute = compute_dtype(basis.dtype)
    q = jnp.where((index < used)[:, None], basis, jnp.zeros_like(basis)).astype(compute)
    mask = (index < used)[:, None] & (index < kept)[None, :]
    r = jnp.where(mask, rotation, jnp.zeros_like(rotation))
    high = r.astype(compute)
    new = _dot(high.T, q) + _dot((r - high.astype(r.dtype)).astype(compute).T, q)
    return jnp.where((index < kept)[:, None], new.astype(basis.dtype), basis)
