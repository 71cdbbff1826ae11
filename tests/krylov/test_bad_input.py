"""What a new user gets wrong in the arguments of `eigsh`, and what the error says."""

import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

import curvax as cx

N = 5


def _on_dict():
    return cx.from_matvec(lambda v: {"w": 2 * v["w"]}, {"w": np.zeros(N, np.float32)})


def _on_arrays():
    return cx.from_matvec(lambda v: 2 * v, N)


@pytest.mark.parametrize("make", [_on_dict, _on_arrays])
@pytest.mark.parametrize(
    "v0, error, message",
    [
        (np.ones(N + 1), ValueError, r"v0.* must have shape \(5,\).*, got \(6,\)"),
        (np.ones((2, 2, N)), ValueError, r"v0.* must have shape \(5,\).*, got \(2, 2, 5\)"),
        (np.ones((0, N)), ValueError, "v0 must have at least one vector"),
        (np.ones(N) * 1j, TypeError, "v0 must be real, got complex"),
        ("ones", TypeError, "v0 must be made of real numbers, got 'ones'"),
        ({"x": np.ones(N)}, ValueError, "v0 must have the structure"),
    ],
)
def test_v0_is_named(make, v0, error, message):
    with pytest.raises(error, match=message):
        cx.eigsh(make(), 1, v0=v0)


def test_v0_of_another_length_names_the_leaf():
    with pytest.raises(ValueError, match=r"leaf 'w' of v0 must have shape \(5,\), got \(6,\)"):
        cx.eigsh(_on_dict(), 1, v0={"w": np.ones(6)})
    other = cx.eigsh(np.eye(6, dtype=np.float32), 1)
    with pytest.raises(ValueError, match=r"v0.* shape \(5,\) or \(b, 5\), got \(1, 6\)"):
        cx.eigsh(_on_dict(), 1, v0=other)


def test_flat_v0_for_a_single_leaf():
    for v0 in (np.ones(N), np.ones((2, N))):
        assert cx.eigsh(_on_dict(), 1, v0=v0).eigenvalues[0] == 2


class TestTracing:
    @pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
    def test_of_the_operator(self, transform):
        with pytest.raises(TypeError, match="eigsh runs on the host: call it outside jax.jit"):
            transform(lambda a: cx.eigsh(a, 1).eigenvalues)(jnp.ones((3, 3, 3)))

    def test_of_something_else(self):
        op = _on_arrays()
        with pytest.raises(TypeError, match="eigsh runs on the host: call it outside jax.jit"):
            jax.jit(lambda scale: scale * cx.eigsh(op, 1).eigenvalues[0])(2.0)
        with pytest.raises(TypeError, match="eigsh runs on the host"):
            jax.vmap(lambda v0: cx.eigsh(op, 1, v0=v0).eigenvalues)(jnp.ones((2, N)))


class OutOfService(Exception):
    pass


@pytest.mark.parametrize("n, block", [(5, 1), (200, 2), (200, "tune")])
def test_what_a_scipy_operator_raises_is_raised(n, block):
    def matvec(v):
        raise OutOfService("disk")

    logging.disable(logging.ERROR)  # JAX also logs the traceback
    try:
        with pytest.raises(OutOfService, match="disk") as caught:
            cx.eigsh(LinearOperator((n, n), matvec, dtype=np.float32), 1, block_size=block)
    finally:
        logging.disable(logging.NOTSET)
    assert "matvec" in [entry.name for entry in caught.traceback]


def test_a_scipy_operator_in_blocks():
    d = np.arange(1, 201, dtype=np.float32)
    a = LinearOperator((200, 200), lambda v: (d * v.ravel())[:, None], dtype=np.float32)
    result = cx.eigsh(a, 2, block_size=4, seed=0)
    np.testing.assert_allclose(result.eigenvalues, [200, 199], rtol=1e-3)


def _stops_after(calls):
    """A SciPy operator of 40 unknowns that presses Ctrl-C in its product number `calls`."""
    values, count = np.linspace(-2.0, 5.0, 40), iter(range(1, 10_000))

    def matvec(v):
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGINT)
        return values * v.reshape(-1)

    return LinearOperator((40, 40), matvec=matvec, dtype=np.float32)


def test_ctrl_c_while_the_matrix_is_formed():
    with pytest.warns(cx.InterruptWarning):
        result = cx.eigsh(_stops_after(30), 3, seed=0)
    assert result.interrupted and result.complete is None and not result.converged.any()
    assert (result.num_matvecs, result.num_verification) == (30, 0)
    assert len(result.history) == 30
    # The first 30 unit vectors are eigenvectors of this matrix: their three largest, proved.
    np.testing.assert_allclose(
        np.sort(np.abs(result.eigenvalues)), np.linspace(-2, 5, 40)[27:30], rtol=1e-6
    )
    assert np.all(result.estimated_errors == 0) and np.isnan(result.residuals).all()


def test_warnings_point_at_the_caller():
    for basis in (40, 20):
        a = np.diag(np.linspace(1, 2, 40)).astype(np.float32)
        with pytest.warns(cx.ConvergenceWarning) as caught:
            cx.eigsh(a, 3, max_matvecs=8, max_basis=basis, seed=0)
        assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_a_start_does_not_matter(scale):
    a = np.diag(np.linspace(1, 2, 40)).astype(np.float32)
    result = cx.eigsh(a, 1, v0=np.full(40, scale), max_basis=20, seed=0, which="LA")
    np.testing.assert_allclose(result.eigenvalues, [2], rtol=1e-3)
