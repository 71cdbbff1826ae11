"""Ctrl-C in Python: the result of what was known, and one warning at the line that called."""

import os
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

import curvax as cx
from curvax.interrupt import InterruptFlag

N = 40
VALUES = np.linspace(1.0, 5.0, N)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def operator(at):
    """A diagonal matrix that presses Ctrl-C in its product number `at`."""
    count = iter(range(1, 10_000))

    def matvec(v):
        if next(count) == at:
            press()
        return VALUES * v.reshape(-1)

    return LinearOperator((N, N), matvec=matvec, dtype=np.float32)


CALLS = {
    "eigsh": lambda op: cx.eigsh(op, 2, max_basis=20, block_size=1, seed=0),
    "eigsh, dense": lambda op: cx.eigsh(op, 2, block_size=1, seed=0),
    "power_iteration": lambda op: cx.power_iteration(op, seed=0),
    "sharpness": lambda op: cx.sharpness(op),
    "trace": lambda op: cx.trace(op, num_matvecs=30, block_size=1, seed=0),
    "diagonal": lambda op: cx.diagonal(op, num_matvecs=30, block_size=1, seed=0),
    "spectral_density": lambda op: cx.spectral_density(op, num_runs=2, num_steps=9, block_size=1),
    "log_det": lambda op: cx.log_det(op, num_runs=2, num_steps=9, block_size=1, seed=0),
    "lanczos_tridiagonal": lambda op: cx.lanczos_tridiagonal(op, 9, seed=0),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_computation_warns_at_the_line_that_called(name):
    with pytest.warns(UserWarning) as caught:
        result = CALLS[name](operator(4))
    (warning,) = caught
    assert warning.category is cx.InterruptWarning and warning.filename == __file__
    assert "interrupted by Ctrl-C" in str(warning.message)
    assert getattr(result, "interrupted", True)


@pytest.mark.parametrize("name", ["eigsh", "eigsh, dense", "solve", "trace"])
def test_a_second_one_within_a_product_on_the_host(name):
    """XLA's error of the callback, in which it fell, is a RuntimeError or a ValueError."""

    def matvec(v):
        press()
        press()
        return VALUES.astype(np.float32) * v

    like = jnp.zeros(N)
    op = cx.from_matvec(lambda v: jax.pure_callback(matvec, like, v, vmap_method="sequential"), N)
    calls = {**CALLS, "solve": lambda op: cx.solve(op, np.ones(N))}
    with pytest.raises(KeyboardInterrupt) as caught:
        calls[name](op)
    assert "callback" in str(caught.value.__cause__)


def tree():
    return {"a": jnp.ones(3), "b": jnp.ones(4), "c": jnp.ones(5)}


BLOCKWISE = {
    "eigsh": lambda blocks, see: cx.eigsh(blocks, 1, seed=0, callback=see),
    "trace": lambda blocks, see: cx.trace(blocks, num_matvecs=6, callback=see, method="xtrace"),
    "diagonal": lambda blocks, see: cx.diagonal(blocks, callback=see, method="hutchinson"),
}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_blocks_warn_once_and_the_rest_is_not_begun(name):
    op = cx.from_matvec(lambda v: jax.tree.map(lambda x: 2 * x, v), tree())
    pressed = []

    def see(progress):
        if not pressed:
            pressed.append(press())

    with pytest.warns(UserWarning) as caught:
        results = BLOCKWISE[name](op.blocks(1), see)
    assert [warning.category for warning in caught] == [cx.InterruptWarning]
    assert caught[0].filename == __file__
    assert any(result.interrupted for result in results.values()) and "interrupted" in str(results)


def test_a_computation_within_another_ends_both_with_one_warning():
    inner = []

    def see(progress):
        if not inner:
            inner.append(cx.eigsh(operator(3), 2, max_basis=20, block_size=1, seed=0))

    with pytest.warns(UserWarning) as caught:
        outer = cx.trace(operator(0), num_matvecs=30, block_size=1, seed=0, callback=see)
    assert [warning.category for warning in caught] == [cx.InterruptWarning]
    assert inner[0].interrupted and outer.interrupted and outer.num_matvecs < 30


def test_the_warning_can_end_a_loop_over_checkpoints():
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", cx.InterruptWarning)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(cx.InterruptWarning):
            for at in (0, 4, 0):
                results.append(cx.eigsh(operator(at), 2, max_basis=20, block_size=1, seed=0))
        assert signal.getsignal(signal.SIGINT) is before
    assert len(results) == 1 and not results[0].interrupted


def test_an_error_and_a_second_ctrl_c_do_without_the_warning():
    with pytest.raises(KeyError), InterruptFlag():
        press()
        raise KeyError
    with pytest.raises(KeyboardInterrupt), InterruptFlag(), InterruptFlag():
        press()
        press()
    with InterruptFlag(warns=False) as flag:
        press()
    assert flag


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_linear_solve_keeps_its_iterate(method):
    b = np.ones(N, np.float32)
    with pytest.warns(UserWarning) as caught:
        result = cx.solve(operator(8), b, method=method)
    assert [warning.category for warning in caught] == [cx.InterruptWarning]
    assert result.interrupted and not result.converged
    assert (result.num_matvecs, result.num_verification) == (8, 1)
    residual = np.linalg.norm(b - VALUES * np.asarray(result.x)) / np.linalg.norm(b)
    assert abs(result.relative_residual - residual) < 1e-6 and residual < 0.05
    assert str(result).startswith(f"Interrupted: {method.upper()} did not solve A x = b")
