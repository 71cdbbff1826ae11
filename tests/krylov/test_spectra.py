"""Eigenpairs of matrices with chosen spectra, against those spectra."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.krylov.spectra import SPECTRA, N, assert_honest, matrix, wanted

import curvax as cx

WANTED = [(5, "LM"), (4, "LA"), (3, "SA"), (5, "BE"), ((4, 2), "BE")]
DTYPES = [np.float32, np.float64]
BLOCKS = [1, 2, 3, 8]
PARAMETERS = [list(SPECTRA), WANTED, DTYPES, BLOCKS]


def _pairwise(parameters):
    """Cases in which every pair of values of two parameters occurs, picked greedily."""

    def pairs(case):
        return {((i, case[i]), (j, case[j])) for i, j in itertools.combinations(range(4), 2)}

    grid = [tuple(case) for case in itertools.product(*parameters)]
    missing = set().union(*map(pairs, grid))
    cases = []
    while missing:
        best = max(grid, key=lambda case: len(pairs(case) & missing))
        cases.append(best)
        missing -= pairs(best)
    return cases


CASES = _pairwise(PARAMETERS)
REST = [case for case in itertools.product(*PARAMETERS) if case not in CASES]


def _solve_and_check(name, ask, dtype, block):
    (k, which), truth = ask, matrix(name)
    with jax.enable_x64(dtype == np.float64):
        # As a function, so that no dense path can see the matrix.
        a = jnp.asarray(truth, dtype)
        op = cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"),
                            jax.ShapeDtypeStruct((N,), dtype))  # fmt: skip
        result = cx.eigsh(
            op, k, which=which, block_size=block, max_basis=48, seed=3, certify="complete",
            max_matvecs=4000,
        )  # fmt: skip
    assert result.all_converged and result.complete
    eps = float(np.finfo(dtype).eps)
    assert_honest(truth, result, eps)
    scale = np.abs(SPECTRA[name]).max()
    expected = wanted(SPECTRA[name], k, which)
    # By Weyl each value is within the tolerance of *an* eigenvalue; with all multiplicities found
    # it is the one of the same rank.
    np.testing.assert_allclose(
        result.eigenvalues, expected, rtol=0, atol=(result.tol_effective.max() + 200 * eps) * scale
    )
    assert result.num_matvecs <= 4000


@pytest.mark.thin(5)
@pytest.mark.parametrize("name, ask, dtype, block", CASES)
def test_pairwise(name, ask, dtype, block):
    _solve_and_check(name, ask, dtype, block)


@pytest.mark.slow
@pytest.mark.parametrize("name, ask, dtype, block", REST)
def test_full_grid(name, ask, dtype, block):
    _solve_and_check(name, ask, dtype, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(1, 1), (2, 2), (7, 7), (30, 29), (30, 28)])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_k_near_n(n, k, which, dtype):
    values = np.linspace(-3, 5, n)
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))
    truth = (basis * values) @ basis.T
    truth = (truth + truth.T) / 2
    with jax.enable_x64(dtype == np.float64):
        result = cx.eigsh(truth.astype(dtype), k, which=which, tol=0, seed=0)
    eps = float(np.finfo(dtype).eps)
    assert result.all_converged and result.complete
    np.testing.assert_allclose(
        result.eigenvalues, wanted(values, k, which), rtol=0, atol=50 * eps * 5
    )
    assert_honest(truth, result, eps)


def test_few_products_of_a_small_matrix_are_not_exceeded():
    truth = matrix("outliers")
    a = jnp.asarray(truth, jnp.float32)
    counted = []
    with pytest.warns(cx.ConvergenceWarning):
        result = cx.eigsh(a, 5, max_basis=N, max_matvecs=12, seed=0, callback=counted.append)
    assert (result.num_matvecs, result.num_verification) == (12, 5) and result.complete is None
    assert len(counted) == 12
    with pytest.raises(ValueError, match=f"max_matvecs must be at least {N}"):
        cx.eigsh(a, N - 1, max_matvecs=N - 1)


def test_thick_restarts_bound_the_memory():
    """Many restarts of a basis that is little larger than k."""
    truth = matrix("both signs")
    op = cx.from_matvec(lambda v: jnp.dot(jnp.asarray(truth, jnp.float32), v), N)
    result = cx.eigsh(op, 5, max_basis=9, seed=0, tol=1e-5)
    assert result.num_restarts > 5 and result.all_converged
    assert_honest(truth, result, float(np.finfo(np.float32).eps))
    np.testing.assert_allclose(
        result.eigenvalues, wanted(SPECTRA["both signs"], 5, "LM"), rtol=1e-5
    )


def test_single_vectors_miss_copies_and_say_so():
    """The documented limit: a residual proves that an eigenvalue is near, no more."""
    a = jnp.asarray(matrix("repeated"), jnp.float32)
    op = cx.from_matvec(lambda v: a @ v, N)
    plain = cx.eigsh(op, 4, which="LA", seed=0, max_basis=60, block_size=1)
    assert plain.all_converged and plain.complete is None
    np.testing.assert_allclose(plain.eigenvalues, [10, 8, 7, 6], rtol=1e-4)
    complete = cx.eigsh(op, 4, which="LA", seed=0, max_basis=60, certify="complete")
    assert complete.complete is True
    np.testing.assert_allclose(complete.eigenvalues, [10, 10, 10, 8], rtol=1e-4)


def test_a_closed_krylov_space_goes_on():
    """Low rank: the space closes after 8 products; the zeros beyond must still be found."""
    a = jnp.asarray(matrix("low rank"), jnp.float32)
    op = cx.from_matvec(lambda v: a @ v, N)
    result = cx.eigsh(op, 12, seed=0, max_basis=60)
    expected = wanted(SPECTRA["low rank"], 12, "LM")
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=0, atol=1e-5)
    smallest = cx.eigsh(op, 4, which="SA", seed=0, max_basis=60)
    np.testing.assert_allclose(smallest.eigenvalues, [0, 0, 0, -5], rtol=0, atol=1e-5)
