"""Compiled device programs on random probes, their products, and the rows of a basis in float64."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.arrays import scale_of
from curvax.columns import matmul, over_columns
from curvax.device import probes
from curvax.operators.base import Operator, RestrictedOperator
from curvax.operators.checked_product import checked_product
from curvax.ops.inner_products import Rows, inner_products, row_products
from curvax.program import Program, program


@program(wide=True)
def forms(block: Array, products: Array) -> tuple[Array, Array, Array]:
    """`zᵀw`, `zᵀz` and `wᵀw` in float64, of rows z and their products w, `(b, n)` each."""
    b, n = block.shape
    z, w = np.arange(2 * b).reshape(2, b)
    pairs = np.hstack([(z, w), (z, z), (w, w)]).T
    zw, zz, ww = row_products([Rows.all_of(block), Rows.all_of(products)], pairs, n).reshape(3, b)
    return zw, zz, ww


@program(wide=True)
def forms_by_block(
    blocks: tuple[RestrictedOperator, ...], block: Array, products: Array
) -> tuple[Array, Array]:
    """`zᵀw` and `wᵀw` in float64, `(b, blocks)`, over the elements of each diagonal block.

    Only the places and lengths are read of `blocks`, not the operator that they are cut out of.
    """
    pairs = []
    for cut in blocks:
        z, w = (cut.extract(x).astype(jnp.float64) for x in (block, products))
        pairs.append((jnp.sum(z * w, axis=1), jnp.sum(w * w, axis=1)))
    return jnp.stack([p[0] for p in pairs], axis=1), jnp.stack([p[1] for p in pairs], axis=1)


@program(donate=(0,), wide=True)
def scatter(mean: Array, block: Array, products: Array, seen: Array) -> tuple[Array, Array]:
    """The running mean of `z ∘ w`, and by how much its sum of squared distances grows.

    Args:
        mean: `(1, n)`, donated, over the probes before.
        block: `(b, n)` probes z.
        products: `(b, n)` their products w.
        seen: how many probes there were before.
    """
    return _scatter(mean, block, products, seen)


@program(donate=(1,), wide=True)
def scatter_by_block(
    blocks: tuple[RestrictedOperator, ...],
    means: tuple[Array, ...],
    block: Array,
    products: Array,
    seen: Array,
) -> tuple[tuple[Array, ...], Array]:
    """The same for the elements of each diagonal block; the growth is `(blocks,)`."""
    pairs = [
        _scatter(mean, cut.extract(block), cut.extract(products), seen)
        for cut, mean in zip(blocks, means, strict=True)
    ]
    return tuple(mean for mean, _ in pairs), jnp.stack([growth for _, growth in pairs])


def _scatter(mean: Array, block: Array, products: Array, seen: Array) -> tuple[Array, Array]:
    def fold(carry: tuple[Array, Array], first: Array, width: int) -> tuple[Array, Array]:
        means, growth = carry
        # Not `_wide`, as in `regress`.
        piece = lax.dynamic_slice_in_dim(means, first, width, axis=1)[0].astype(jnp.float64)
        entries = _wide(block, first, width) * _wide(products, first, width)
        for i, row in enumerate(entries):
            before = row - piece
            piece = piece + before / (seen + i + 1)
            growth = growth + jnp.sum(before * (row - piece))
        narrow = piece[None].astype(means.dtype)
        return lax.dynamic_update_slice_in_dim(means, narrow, first, axis=1), growth

    rows, start = 3 * block.shape[0], (mean, jnp.zeros(()))
    folded: tuple[Array, Array] = over_columns(fold, start, mean.shape[1], rows=rows)
    return folded


@program(donate=(1,), wide=True)
def project_off(basis: Array, block: Array) -> Array:
    """The donated rows of `block (b, n)` less their components along orthonormal rows `basis`.

    Rows of the basis that are not in use must be zero.
    """
    along_basis = _inner(basis, block)

    def subtract(out: Array, first: Array, width: int) -> Array:
        along = matmul(along_basis.T, _wide(basis, first, width))
        piece = _wide(out, first, width) - along
        return lax.dynamic_update_slice_in_dim(out, piece.astype(out.dtype), first, axis=1)

    rows = basis.shape[0] + 2 * block.shape[0]
    projected: Array = over_columns(subtract, block, block.shape[1], rows=rows)
    return projected


@program(wide=True)
def inner(basis: Array, block: Array) -> Array:
    """`basis (rows, n)` times the transpose of `block (b, n)`, in float64."""
    return _inner(basis, block)


def _inner(basis: Array, block: Array) -> Array:
    return inner_products(Rows.all_of(basis), Rows.all_of(block), block.shape[1])


def _wide(rows: Array, first: Array, width: int) -> Array:
    # The barrier keeps XLA from widening all of the rows before it slices them.
    rows, first = lax.optimization_barrier((rows, first))
    return lax.dynamic_slice_in_dim(rows, first, width, axis=1).astype(jnp.float64)


def _overlaps(distribution: str, basis: Array, like: Array, seed: Array) -> tuple[Array, Array]:
    """`Q Ωᵀ` and `Ω Ωᵀ` in float64, for the first probes of the sequence, as many as `like`.

    The probes, drawn again piece by piece, need no memory of their own; those of `"sphere"` are
    not normalised.
    """
    k, n = like.shape[0], basis.shape[1]
    rows = jnp.arange(k, dtype=jnp.uint32)

    def add(total: tuple[Array, Array], first: Array, width: int) -> tuple[Array, Array]:
        piece = probes.columns(seed, rows, first, width, basis.dtype, distribution)
        wide = piece.astype(jnp.float64)
        products = matmul(_wide(basis, first, width), wide.T), matmul(wide, wide.T)
        return total[0] + products[0], total[1] + products[1]

    start = jnp.zeros((basis.shape[0], k)), jnp.zeros((k, k))
    totals: tuple[Array, Array] = over_columns(add, start, n, rows=basis.shape[0] + 2 * k)
    return totals


overlaps = {
    name: Program(functools.partial(_overlaps, name), wide=True) for name in probes.DISTRIBUTIONS
}


@program(donate=(0,))
def store(rows: Array, block: Array, first: Array) -> Array:
    """Write a block into the donated rows, from the row `first` on."""
    return lax.dynamic_update_slice_in_dim(rows, block, first, axis=0)


def _norms(rows: Array) -> Array:
    scale = scale_of(rows, axis=1)
    return scale[:, 0] * jnp.linalg.norm(rows / scale, axis=1)


@program()
def unit_entries(op: Operator, like: Array, first: Array) -> tuple[Array, Array]:
    """Entries of the diagonal from the index `first` on, as many as `like` is long.

    Returns:
        The entries, and the norm of each product.
    """
    b, n = like.shape[0], op.shape[0]
    places = first + jnp.arange(b, dtype=first.dtype)
    block = jnp.zeros((b, n), op.dtype).at[jnp.arange(b), places].set(1)
    products = checked_product(op, block)
    return products[jnp.arange(b), places], _norms(products)


@program(donate=(0,), wide=True)
def regress(state: Array, block: Array, products: Array) -> Array:
    """Fold probes z and products w into the fits `w ≈ d z`, entry by entry.

    Recursive least squares: with `e` the residual before and `e'` after a probe is taken in,
    `d += z e / Σz²` and the sum of squared residuals grows by `e e'`.

    Args:
        state: `(3, n)`, donated: the fits d; the roots of their sums of squared residuals, which
            neither overflow nor underflow where the squares would; `Σz²`.
        block: `(b, n)`.
        products: `(b, n)`.
    """

    def fold(state: Array, first: Array, width: int) -> Array:
        # Not `_wide`: a loop copies what it carries where that passes a barrier (jaxlib 0.11).
        piece = lax.dynamic_slice_in_dim(state, first, width, axis=1)
        fit, root, weight = piece.astype(jnp.float64)
        zs, ws = (_wide(x, first, width) for x in (block, products))
        squares = root * root
        for z, w in zip(zs, ws, strict=True):
            before = w - fit * z
            weight = weight + z * z
            fit = fit + z * before / jnp.where(weight > 0, weight, 1)
            squares = squares + before * (w - fit * z)
        piece = jnp.stack([fit, jnp.sqrt(jnp.maximum(squares, 0)), weight]).astype(state.dtype)
        return lax.dynamic_update_slice_in_dim(state, piece, first, axis=1)

    folded: Array = over_columns(fold, state, block.shape[1], rows=6 + 2 * block.shape[0])
    return folded


@program(wide=True)
def regression_stderr(state: Array, samples: Array, eps: Array) -> Array:
    """Standard errors `(n,)` of the fits of `regress`, with what a rounding of a product adds.

    Given the probes, the residuals of an entry are independent, of one variance
    `Σ_{j≠i} A_ij²`, so that of the fit is that over `Σz²`.
    """

    def fill(out: Array, first: Array, width: int) -> Array:
        fit, root, weight = _wide(state, first, width)
        variance = root * root / (jnp.maximum(samples - 1, 1) * weight) + (eps * fit) ** 2
        piece = jnp.where(samples > 1, jnp.sqrt(variance), jnp.inf)
        return lax.dynamic_update_slice_in_dim(out, piece.astype(out.dtype), first, axis=0)

    n = state.shape[1]
    filled: Array = over_columns(fill, jnp.zeros(n, state.dtype), n, rows=4)
    return filled


@program(wide=True)
def leave_one_out_diagonal(
    basis: Array, products: Array, seed: Array, small: tuple[Array, Array, Array, Array]
) -> tuple[Array, Array]:
    """The mean and the standard error of XDiag's leave-one-out estimates, entry by entry.

    With `Q` the basis and `Z = A Q` by rows, s the directions that leaving out one column takes
    from the range, and d, g, h as in `small`:

        est_i = diag(QᵀZ) − (Qs_i)∘(Zs_i) + d_i ω_i∘(Qs_i)
        Δ_ij  = est_i − (est_i on the sketch without j as well)
              = (Qs_j − g Qs_i) ∘ (Zs_j − g Zs_i + g d_i ω_i) h

    The variance of the mean is `var(est)/k + mean Δ_ij Δ_ji`; see `leave_one_out.stderr`.

    Args:
        basis: `(k, n)`.
        products: `(k, n)`.
        seed: of the Rademacher probes ω.
        small: `(k, k)` the directions s as columns; `(k,)` `d_i = s_iᵀr_i`; `(k, k)`
            `g = s_iᵀs_j`; `(k, k)` `h = 1/(1 − g²)`, zero where j takes nothing more.
    """
    s, d, g, h = small
    k, n = basis.shape
    rows = jnp.arange(k, dtype=jnp.uint32)

    def entries(first: Array, width: int) -> tuple[Array, Array]:
        q, z = (_wide(x, first, width) for x in (basis, products))
        signs = probes.columns(seed, rows, first, width, basis.dtype, "rademacher")
        qs, zs, omega = matmul(s.T, q), matmul(s.T, z), signs.astype(jnp.float64) * d[:, None]
        single = qs * (omega - zs)
        mean = jnp.mean(single, axis=0)
        spread = jnp.sum((single - mean[None]) ** 2, axis=0) / max(k - 1, 1)

        def pair_with(i: Array, total: Array) -> Array:
            gi, hi = g[i][:, None], h[i][:, None]
            here = (qs - gi * qs[i][None]) * (zs - gi * (zs[i] - omega[i])[None])
            back = (qs[i][None] - gi * qs) * (zs[i][None] - gi * (zs - omega))
            mask = (rows != i.astype(rows.dtype))[:, None]
            return total + jnp.sum(jnp.where(mask, here * back * hi * h[:, i][:, None], 0), axis=0)

        shared = lax.fori_loop(0, k, pair_with, jnp.zeros(width)) / max(k * (k - 1), 1)
        # Where nothing is left to estimate: the roundings of basis and products, of any sign.
        eps = float(jnp.finfo(basis.dtype).eps)
        rounding = (2 * eps) ** 2 * jnp.sum(q * q, axis=0) * jnp.sum(z * z, axis=0)
        variance = spread / k + jnp.maximum(shared, 0) + rounding
        if k == 1 < n:  # one sample shows no spread
            variance = jnp.full_like(variance, jnp.inf)
        return jnp.sum(q * z, axis=0) + mean, jnp.sqrt(variance)

    def fill(out: tuple[Array, Array], first: Array, width: int) -> tuple[Array, Array]:
        value, stderr = (
            lax.dynamic_update_slice_in_dim(x, piece.astype(x.dtype), first, axis=0)
            for x, piece in zip(out, entries(first, width), strict=True)
        )
        return value, stderr

    empty = jnp.zeros(n, basis.dtype)
    filled: tuple[Array, Array] = over_columns(fill, (empty, empty), n, rows=8 * k)
    return filled
