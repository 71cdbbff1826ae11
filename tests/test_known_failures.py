"""What is known to fail elsewhere: each case with the numbers published for it.

hessian-eigenthings 1.0.0a5 returns wrong values, marked as converged, in all of these, or fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx


def _diagonal(values):
    d = jnp.asarray(values, jnp.float32)
    return cx.from_matvec(lambda v: d * v, len(values))


def _network(dtype=jnp.float32):
    """A network 20-32-3 of 771 parameters, and 8 samples: rank 8."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    params = {
        "b1": jnp.zeros(32, dtype),
        "b2": jnp.zeros(3, dtype),
        "w1": normal(20, 32, scale=20**-0.5),
        "w2": normal(32, 3, scale=32**-0.5),
    }
    batch = normal(8, 20, scale=1), jnp.asarray(rng.integers(0, 3, 8))
    return params, batch


def _forward(p, batch):
    hidden = jnp.tanh(batch[0] @ p["w1"] + p["b1"][None])
    return hidden @ p["w2"] + p["b2"][None]


LOSS = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def _fisher_spectrum(params, batch):
    """The nonzero eigenvalues, from the Gram matrix of the gradients in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        x, y = jnp.asarray(np.asarray(batch[0], np.float64)), batch[1]

        def one(p, i):
            z = _forward(p, (x[i][None], y[i][None]))[0]
            return jax.nn.logsumexp(z) - z[y[i]]

        rows = [jax.grad(one)(wide, i) for i in range(8)]
        flat = np.stack([np.asarray(ravel_pytree(row)[0]) for row in rows])
    return np.linalg.eigvalsh(flat @ flat.T / 8)[::-1]


@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_low_rank_fisher(scale):
    """Ten values of a matrix of rank 8: eight true ones and two zeros, none made up."""
    params, batch = _network()
    op = cx.fisher(_forward, LOSS, params, batch)
    result = cx.eigsh(scale * op, 10, seed=0)
    truth = scale * np.append(_fisher_spectrum(params, batch), [0, 0])
    assert result.all_converged and result.orthogonality < 1e-5
    np.testing.assert_allclose(result.eigenvalues, truth, atol=1e-5 * truth[0])
    assert np.all(result.residuals <= 1e-3 * truth[0])


def test_no_ghosts_beyond_fifty_steps():
    """diag(1000, 500, 200, 100, 50) and a bulk: ten distinct eigenvalues, whatever the steps."""
    bulk = np.sort(np.random.default_rng(0).uniform(size=1995))[::-1]
    result = cx.eigsh(_diagonal([1000, 500, 200, 100, 50, *bulk]), 10, tol=1e-6, seed=0)
    assert result.all_converged and result.num_matvecs > 60
    np.testing.assert_allclose(
        result.eigenvalues, [1000, 500, 200, 100, 50, *bulk[:5]], rtol=1e-5, atol=1e-4
    )


def test_multiplicities_are_found_when_searched_for():
    values = [10, 10, 10, 5, 5, 3, *[1] * 44]
    result = cx.eigsh(_diagonal(values), 5, certify="complete", seed=0, max_basis=30)
    assert result.complete
    np.testing.assert_allclose(result.eigenvalues, values[:5], rtol=1e-5)
    identity = cx.eigsh(_diagonal(np.ones(50)), 5, seed=0)
    np.testing.assert_allclose(identity.eigenvalues, np.ones(5), rtol=1e-5)


def test_as_many_pairs_as_parameters():
    values = np.arange(1.0, 13)
    result = cx.eigsh(_diagonal(values), 12, seed=0)
    np.testing.assert_allclose(result.eigenvalues, values[::-1], rtol=1e-5)


def test_parameters_in_bfloat16():
    """Every estimator runs, and agrees with the parameters widened by hand."""
    params, batch = _network(jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    batch = batch[0].astype(jnp.float32), batch[1]
    narrow, reference = (cx.fisher(_forward, LOSS, p, batch) for p in (params, wide))
    v = jnp.ones((1, narrow.shape[0]))
    np.testing.assert_allclose(narrow.product(v), reference.product(v), rtol=1e-5, atol=1e-6)
    assert cx.eigsh(narrow, 3, seed=0).all_converged
    trace = cx.trace(narrow, method="hutch++", num_matvecs=30, seed=0)
    low, high = trace.interval
    assert low <= _fisher_spectrum(wide, batch).sum() <= high
    density = cx.spectral_density(narrow, num_runs=3, num_steps=12, seed=0)
    assert abs(np.trapezoid(density.density, density.grid) - 1) < 1e-2


def test_ragged_batches():
    """Ten samples by four: the last two count as two."""
    params, _ = _network()
    rng = np.random.default_rng(1)
    batch = jnp.asarray(rng.normal(size=(10, 20)), jnp.float32), jnp.asarray(rng.integers(0, 3, 10))
    whole = cx.ggn(_forward, LOSS, params, batch)
    split = cx.ggn(_forward, LOSS, params, batch, microbatch_size=4)
    listed = cx.ggn(
        _forward, LOSS, params, [tuple(a[:7] for a in batch), tuple(a[7:] for a in batch)]
    )
    v = jnp.ones((1, 771))
    scale = float(jnp.abs(whole.product(v)).max())
    for other in (split, listed):
        assert float(jnp.abs(other.product(v) - whole.product(v)).max()) <= 1e-6 * scale


def test_ignored_labels():
    """Half of the labels ignored: the matrix is that of the other half."""
    params, (x, y) = _network()
    masked = cx.ggn(_forward, LOSS, params, (x, y.at[::2].set(-100)))
    half = cx.ggn(_forward, LOSS, params, (x[1::2], y[1::2]))
    v = jnp.ones((1, 771))
    np.testing.assert_allclose(masked.product(v), half.product(v), rtol=1e-5, atol=1e-6)


def test_calls_without_a_seed_differ():
    op = _diagonal(np.linspace(-1, 1, 200))
    matrix = op + cx.identity(op)
    dense = cx.from_matvec(lambda v: jnp.roll(v, 1) + jnp.roll(v, -1), 200)
    first, second = (cx.trace(dense, method="hutchinson", num_matvecs=4) for _ in range(2))
    assert first.seed != second.seed and first.estimate != second.estimate
    again = cx.trace(dense, method="hutchinson", num_matvecs=4, seed=first.seed)
    assert again.estimate == first.estimate
    assert cx.eigsh(matrix, 1).seed != cx.eigsh(matrix, 1).seed


def test_momentum_moves_no_eigenvalue():
    result = cx.power_iteration(_diagonal([3.0, 1, 0.5]), momentum=0.5, tol=1e-5, seed=0)
    np.testing.assert_allclose(result.eigenvalues, [3.0], rtol=1e-6)


def test_unused_parameters_give_zero_rows():
    params, batch = _network()
    op = cx.hessian(
        lambda p, b: LOSS(_forward(p["used"], b), b), {"idle": jnp.ones(4), "used": params}, batch
    )
    product = op @ {"idle": jnp.ones(4), "used": params}
    np.testing.assert_array_equal(product["idle"], np.zeros(4))
    row = op @ {"idle": jnp.ones(4), "used": jax.tree.map(jnp.zeros_like, params)}
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(row))


def test_density_of_a_bulk_beside_outliers():
    """A width of range / steps would be 1.25, a thousand times the bulk."""
    bulk = 1e-3 * np.random.default_rng(0).normal(size=1997)
    density = cx.spectral_density(_diagonal([100, 50, 20, *bulk]), seed=0, num_runs=4)
    assert density.width < 1e-3
    inside = np.abs(density.grid) < 5e-3
    assert np.trapezoid(density.density[inside], density.grid[inside]) > 0.99
