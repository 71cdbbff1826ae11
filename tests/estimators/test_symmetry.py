"""What is measured of symmetry, by products that every method makes anyway."""

import jax.numpy as jnp
import numpy as np
import pytest
from tests.estimators.references import decaying

import curvax as cx

N = 60
NOISE = np.random.default_rng(0).normal(size=(N, N)) / N**0.5
SYMMETRIC = NOISE + NOISE.T + 3 * np.eye(N)
START = jnp.asarray(np.random.default_rng(1).normal(size=N), jnp.float32)


def _operator(matrix):
    a = jnp.asarray(matrix, jnp.float32)
    return cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), len(matrix))


CALLS = {
    "xtrace": lambda op: cx.trace(op, num_matvecs=8, seed=0),
    "xdiag": lambda op: cx.diagonal(op, method="xdiag", num_matvecs=20, seed=0),
    "density": lambda op: cx.spectral_density(op, num_runs=2, num_steps=4, seed=0),
    "one run": lambda op: cx.spectral_density(op, num_runs=1, num_steps=4, seed=0),
    "log_det": lambda op: cx.log_det(op, damping=10.0, num_runs=2, num_steps=4, seed=0),
    "lanczos": lambda op: cx.lanczos_tridiagonal(op, 2, seed=0),
    "reorthogonalised": lambda op: cx.lanczos_tridiagonal(op, 4, reorthogonalize=True, seed=0),
    "power": lambda op: cx.power_iteration(op, max_matvecs=2, seed=0),
    "momentum": lambda op: cx.power_iteration(op, max_matvecs=2, momentum=0.5, seed=0),
    "solve": lambda op: cx.solve(op, START, max_matvecs=4),
    "eigsh": lambda op: cx.eigsh(op, 2, max_matvecs=20, seed=0),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused(name):
    """Half of the entries are those of another matrix."""
    with pytest.raises(ValueError, match="A must be symmetric"):
        CALLS[name](_operator(SYMMETRIC + np.triu(NOISE, 1)))


@pytest.mark.thin(6)
@pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_noise_of_16_bits_is_not(name, scale):
    """Products with a relative error of 2⁻⁹ each, of a symmetric matrix."""
    a = scale * SYMMETRIC * (1 + 2.0**-9 * np.random.default_rng(2).normal(size=(N, N)))
    CALLS[name](_operator(a) + scale * (1 if name == "log_det" else 0) * 10 * cx.identity(N))


@pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
def test_outliers_beside_a_small_bulk():
    """A bulk at the roundoff of the largest eigenvalue is asymmetric by rounding alone."""
    values = np.concatenate([[1.0, 0.3], 1e-8 * np.linspace(1, 2, N - 2)])
    q, _ = np.linalg.qr(NOISE)
    op = _operator((q * values) @ q.T)
    cx.lanczos_tridiagonal(op, 30, seed=0)
    cx.spectral_density(op, num_runs=2, num_steps=20, seed=0)
    found = cx.power_iteration(op, 4, max_matvecs=200, seed=0)
    np.testing.assert_allclose(found.eigenvalues[:2], [1, 0.3], rtol=1e-5)


class TestPairsOfAnotherOperator:
    """Deflation by pairs that are not the operator's was silently wrong once."""

    A = decaying()
    OTHER = A + 0.02 * np.diag(np.random.default_rng(3).normal(size=len(A)))
    METHODS = {
        "hutchinson": lambda op, r: cx.trace(op, method="hutchinson", deflate=r, seed=0),
        "xtrace": lambda op, r: cx.trace(op, num_matvecs=24, method="xtrace", deflate=r, seed=0),
        "density": lambda op, r: cx.spectral_density(op, num_steps=5, deflate=r, seed=0),
        "log_det": lambda op, r: cx.log_det(op, damping=0.1, num_steps=5, deflate=r, seed=0),
    }

    @pytest.mark.parametrize("name", METHODS)
    def test_refused(self, name):
        pairs = cx.eigsh(_operator(self.OTHER), 4, seed=0)
        with pytest.raises(ValueError, match="deflate must hold pairs of this very operator"):
            self.METHODS[name](_operator(self.A), pairs)

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
    def test_its_own_are_taken(self, name, dtype):
        op = _operator(self.A)
        pairs = cx.eigsh(op, 4, tol=3e-2, basis_dtype=dtype, seed=0)
        without, result = (self.METHODS[name](op, r) for r in (None, pairs))
        assert result.num_matvecs == without.num_matvecs + 4  # one of each vector

    @pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
    def test_those_that_have_not_converged_are_taken_too(self):
        op = _operator(self.A)
        pairs = cx.eigsh(op, 4, max_matvecs=8, max_basis=8, seed=0)
        assert not pairs.all_converged
        result = cx.trace(op, method="hutchinson", num_matvecs=50, deflate=pairs, seed=0)
        assert abs(result.estimate - np.trace(self.A)) < 4 * result.stderr
