"""Symmetric matrices with chosen spectra, and what of them is wanted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx

N = 160


def _noise(seed, size):
    return np.random.default_rng(seed).normal(size=size)


def _bulk(seed=0):
    return 0.4 * _noise(seed, N - 12)


SPECTRA = {
    "outliers": np.concatenate([np.linspace(4, 20, 12), _bulk()]),
    "both signs": np.concatenate([[-15, -9, -6, -5, -4.5], np.linspace(5, 14, 7), _bulk(1)]),
    "low rank": np.concatenate([[8, 7, 6, 4, 3, 2, -5], np.zeros(N - 7)]),
    "identity": np.ones(N),
    "repeated": np.concatenate([[10, 10, 10, 8, 7, 6, -6, -6], _bulk(2), np.zeros(4)]),
    "clustered": np.concatenate([10 + 1e-2 * np.arange(4), [8, -7, -7.01, -4], _bulk(3), [1] * 4]),
    "two values": np.concatenate([np.full(6, 50.0), np.ones(N - 6)]),
    "small": 1e-14 * np.concatenate([np.linspace(4, 20, 12), _bulk(4)]),
    "large": 1e14 * np.concatenate([np.linspace(-9, 20, 12), _bulk(5)]),
    "zero": np.zeros(N),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal(cx.Operator):
    """A diagonal matrix, whose values are arguments: those of one size share every program."""

    values: jax.Array
    space: cx.VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block):
        return self.values[None] * block


def diagonal(values, dtype=np.float32):
    values = jnp.asarray(np.asarray(values), dtype)
    return Diagonal(values, cx.VectorSpace.of(values, dtype))


@functools.lru_cache
def matrix(name):
    """A float64 matrix with the spectrum of that name, in a random basis."""
    basis, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(N, N)))
    full = (basis * SPECTRA[name]) @ basis.T
    return (full + full.T) / 2


def operator(name="outliers"):
    """That matrix in float32, by its products alone."""
    a = jnp.asarray(matrix(name), jnp.float32)
    return cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), N)


def wanted(values, k, which):
    """The wanted eigenvalues, descending, by sorting: independent of the package's own code."""
    ascending = np.sort(values)
    if which == "LM":
        chosen = ascending[np.argsort(-np.abs(ascending), kind="stable")[:k]]
    elif which == "LA":
        chosen = ascending[::-1][:k]
    elif which == "SA":
        chosen = ascending[:k]
    else:
        high, low = k if isinstance(k, tuple) else (k - k // 2, k // 2)
        chosen = np.concatenate([ascending[::-1][:high], ascending[:low]])
    return np.sort(chosen)[::-1]


def true_residuals(matrix, result):
    """`‖A x − λ x‖/‖x‖` of each returned pair, in float64."""
    vectors = np.asarray(result.eigenvectors, np.float64)
    difference = vectors @ matrix - result.eigenvalues[:, None] * vectors
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(vectors, axis=1)


def assert_honest(matrix, result, eps):
    """What every result must satisfy, converged or not."""
    scale = np.abs(np.linalg.eigvalsh(matrix)).max()
    residuals = true_residuals(matrix, result)
    rounding = 200 * eps * scale
    assert np.all(np.diff(result.eigenvalues) <= 0)
    np.testing.assert_allclose(result.residuals, residuals, rtol=1e-2, atol=rounding)
    np.testing.assert_array_equal(result.bounds, result.residuals)
    assert np.all(result.estimated_errors <= result.residuals)
    assert np.all((residuals <= result.tol_effective * scale + rounding)[result.converged])
    vectors = np.asarray(result.eigenvectors, np.float64)
    overlap = np.abs(vectors @ vectors.T - np.eye(len(vectors))).max()
    # Each restart rounds the rows anew; the errors add up as a random walk does.
    assert overlap <= 20 * eps * np.sqrt(1 + result.num_restarts)
    assert abs(overlap - result.orthogonality) <= 20 * eps
