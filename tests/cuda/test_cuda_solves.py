"""Solves with the basis on a CUDA device, against a dense float64 `eigh`."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

pytestmark = pytest.mark.cuda


def classifier(rng, width=24, classes=11, samples=200):
    params = {
        "in": jnp.asarray(rng.normal(size=(8, width)) / 3, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(width, classes)) / 5, jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(samples, 8)), jnp.float32)
    y = jnp.asarray(rng.integers(0, classes, samples), jnp.int32)

    def loss(p, batch):
        with jax.default_matmul_precision("highest"):
            return cx.losses.softmax_cross_entropy(
                jnp.tanh(batch[0] @ p["in"]) @ p["out"], batch[1]
            )

    return params, (x, y), loss


def dense(loss, params, batch):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params)
        flat, unravel = jax.flatten_util.ravel_pytree(wide)
        data = (jnp.asarray(np.asarray(batch[0], np.float64)), batch[1])
        return np.linalg.eigvalsh(jax.hessian(lambda v: loss(unravel(v), data))(flat))


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("basis_dtype", [None, "float16"])
def test_eigenvalues_are_those_of_the_dense_matrix(block_size, basis_dtype, rng):
    params, batch, loss = classifier(rng)
    operator = cx.hessian(loss, params, batch)
    got = cx.eigsh(
        operator, 6, which="LA", tol=1e-3, seed=0, block_size=block_size, basis_dtype=basis_dtype
    )
    assert got.all_converged
    want = dense(loss, params, batch)[::-1][:6]
    assert np.abs(got.eigenvalues - want).max() <= 1e-4 * want[0]


def test_the_basis_is_not_copied(rng):
    """Rows that a step adds are written where they belong: no second basis in memory."""
    from curvax.ops.block_ortho import orthonormalize_block

    rows, n = 24, 2_000_000
    basis = jax.ShapeDtypeStruct((rows, n), jnp.float32)
    block = jax.ShapeDtypeStruct((1, n), jnp.float32)
    with jax.enable_x64(True):
        compiled = (
            jax.jit(lambda q, w: orthonormalize_block(q, w, np.int32(3), 0), donate_argnums=0)
            .lower(basis, block)
            .compile()
        )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * rows * n
    assert memory.temp_size_in_bytes < 4 * n * 4
