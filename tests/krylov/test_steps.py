"""Steps on a device: given before the one before has been read, and several together if short.

The device is made of the CPU, where `on_device` says so; the arithmetic is the same.
"""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator
from tests.krylov.test_storage import network_matrix

import curvax as cx
from curvax.device import programs
from curvax.device.programs import solve_clock
from curvax.krylov import lanczos
from curvax.krylov.lanczos import Lanczos

VALUES = np.concatenate([[20.0, 17.0, 15.0, 13.0], np.linspace(-1, 1, 196)])


def diagonal(values=VALUES):
    d = jnp.asarray(values, jnp.float32)
    return cx.from_matvec(lambda v: d * v, len(values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Own(cx.Operator):
    """An operator of one's own, whose code is traced in every program that multiplies by it."""

    factor: jax.Array
    space: cx.VectorSpace = dataclasses.field(metadata={"static": True})
    modes = []

    def product(self, block):
        self.modes.append(jnp.arange(3.0).dtype == np.float64)
        return self.factor * block


@pytest.fixture(params=["one", "several"])
def device(request, monkeypatch):
    """Late tests, with each step a program of its own or as many together as may be."""
    monkeypatch.setattr(lanczos, "on_device", lambda op: True)
    monkeypatch.setattr(lanczos, "_SHORT", {"one": 0.0, "several": 1e9}[request.param])
    return programs.TOGETHER if request.param == "several" else 1


@pytest.fixture
def waits(monkeypatch):
    """How often the host waited, for small numbers or for anything else."""
    counts = {"numbers": 0, "others": 0}
    own, other = lanczos._on_host, jax.block_until_ready

    def numbers(array):
        counts["numbers"] += 1
        return own(array)

    def others(tree):
        counts["others"] += 1
        return other(tree)

    monkeypatch.setattr(lanczos, "_on_host", numbers)
    monkeypatch.setattr(jax, "block_until_ready", others)
    return counts


def begun(op, rows=60, block=1):
    state = Lanczos(op, rows, block, np.float32, 0, solve_clock())
    state.start(state.random_block())
    return state


class TestWaits:
    @pytest.mark.parametrize("block", [1, 3])
    def test_one_for_each_step_on_a_cpu(self, waits, block):
        state = begun(diagonal(), block=block)
        waits["numbers"] = 0
        for count in range(1, 9):
            state.step(100)
            state.ritz()
            assert waits == {"numbers": count, "others": 0} and state.unread == 0

    def test_in_a_solve(self, waits):
        result = cx.eigsh(diagonal(), 4, seed=0, max_basis=60, return_eigenvectors=False)
        assert result.num_restarts == 0
        # The start, and then each step; a rotation and four products to verify.
        assert waits == {"numbers": 1 + result.num_matvecs, "others": 1 + 4}

    def test_several_steps_share_one(self, device, waits):
        state = begun(diagonal())
        waits["numbers"] = 0
        for _ in range(33):
            state.step(100)
        assert waits["others"] == 0
        # Two programs of one step measure how long it takes.
        assert waits["numbers"] == 2 + -(-31 // device)

    def test_the_orthogonalisation_is_given_before_the_product_is_waited_for(self, monkeypatch):
        state, order = begun(diagonal()), []

        def noted(name, fun):
            return lambda *args: (order.append(name), fun(*args))[1]

        for place, name in [
            (programs, "multiply"),
            (programs, "orthonormalize"),
            (lanczos, "_on_host"),
            (jax, "block_until_ready"),
        ]:
            monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
        state.step(1)
        assert order == ["multiply", "orthonormalize", "_on_host"]


class TestLate:
    def test_the_next_step_is_given_before_one_is_read(self, device):
        state = begun(diagonal())
        state.step(100)
        assert state.known == 1 and state.unread == 1
        state.step(100)
        assert state.known == 2 and state.unread == device
        while state.unread:
            state.step(0)
        assert state.known == state.used

    def test_all_steps_are_those_of_a_cpu(self, device):
        """The same decomposition, whenever it is read."""
        late = begun(diagonal())
        for _ in range(20):
            late.step(100)
        values = late.ritz().values
        lanczos_on_cpu = begun(diagonal())
        lanczos_on_cpu._ahead = 0
        for _ in range(20):
            lanczos_on_cpu.step(100)
        np.testing.assert_allclose(values, lanczos_on_cpu.ritz().values, rtol=0, atol=2e-5)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_basis": 12, "basis_dtype": "float16"},
            {"block_size": 2, "certify": "complete", "max_basis": 22},
        ],
    )
    def test_results_and_how_late(self, device, monkeypatch, options):
        full, op = network_matrix(301)
        result = cx.eigsh(op, 4, seed=0, tol=1e-3, **options)
        monkeypatch.setattr(lanczos, "on_device", lambda op: False)
        prompt = cx.eigsh(op, 4, seed=0, tol=1e-3, **options)
        assert result.all_converged
        np.testing.assert_allclose(result.eigenvalues, prompt.eigenvalues, rtol=1e-5)
        block = options.get("block_size", 1)
        # A restart or a search may begin later too.
        ends = 1 + result.num_restarts + (options.get("certify") == "complete")
        extra = result.num_matvecs - prompt.num_matvecs
        assert extra <= 2 * device * block * ends
        vectors = np.asarray(result.eigenvectors, np.float64)
        residuals = np.linalg.norm(vectors @ full - result.eigenvalues[:, None] * vectors, axis=1)
        np.testing.assert_allclose(result.residuals, residuals, rtol=2e-2, atol=1e-4)
        assert [p.matvecs for p in result.history] == list(
            range(block, result.num_matvecs + 1, block)
        )

    @pytest.mark.parametrize("most", [4, 7, 15])
    def test_no_product_beyond_the_most(self, device, most):
        op = network_matrix(301)[1]
        with pytest.warns(cx.ConvergenceWarning):
            result = cx.eigsh(op, 4, seed=0, tol=1e-7, max_matvecs=most, max_basis=8)
        assert result.num_matvecs == most

    def test_ctrl_c(self, device):
        def press(progress):
            if progress.matvecs == 6:
                os.kill(os.getpid(), signal.SIGINT)

        op = network_matrix(301)[1]
        with pytest.warns(cx.InterruptWarning):
            result = cx.eigsh(op, 4, seed=0, tol=1e-7, callback=press)
        assert result.interrupted and result.num_restarts == 0
        assert 7 <= result.num_matvecs <= 6 + 2 * device


class TestReports:
    def poisoned(self, at):
        """Its products hold NaN in `b` from one on: those of vectors that it has made large."""
        count = iter(range(1, 1000))

        def matvec(v):
            out = VALUES.astype(np.float32) * v.reshape(-1)
            if next(count) >= at:
                out[100:] = np.nan
            return out

        return LinearOperator((200, 200), matvec=matvec, dtype=np.float32)

    def test_a_product_that_is_not_finite(self, device):
        match = "product 5 of the operator is not finite.*the vector .100 of 200."
        with pytest.raises(FloatingPointError, match=match):
            cx.eigsh(self.poisoned(5), 3, seed=0)

    def test_asymmetry(self, device):
        a = np.diag(VALUES).astype(np.float32)
        a[0, 1:] += 1
        dense = jnp.asarray(a)
        op = cx.from_matvec(lambda v: jnp.dot(dense, v, precision="highest"), 200)
        with pytest.raises(ValueError, match="A must be symmetric: at product [23] "):
            cx.eigsh(op, 3, seed=0)


class TestProgram:
    def test_the_basis_is_written_in_place(self, native_kernels):
        rows, n = 20, 5000
        basis = jax.ShapeDtypeStruct((rows, n), np.float32)
        block, zero = jax.ShapeDtypeStruct((1, n), np.float32), np.int32(0)
        work = programs.steps.work_bytes(
            solve_clock(), diagonal(np.ones(n)), basis, block, zero, np.zeros(2, np.uint32), zero
        )
        assert work < 3 * 4 * n

    @pytest.mark.parametrize("wide", [False, True])
    def test_the_users_code_sees_the_mode_that_the_user_has_set(self, wide):
        with jax.enable_x64(wide):
            state = begun(Own(jnp.float32(2), cx.VectorSpace.of(np.zeros(40), jnp.float32)))
            state._ahead, state._step_seconds = 1, 0.1 * lanczos._SHORT
            Own.modes.clear()
            state.step(20)
        assert set(Own.modes) == {wide} and len(state._begun) == 1


def test_seconds_are_shared_out_by_the_products_that_were_waited_for_alone():
    state = begun(diagonal())
    seconds = state.clock.seconds
    state._product_seconds = [0.5, 0.25, 7.0]
    seconds.update(products=6.0, orthogonalization=1.0)
    state.share_out_seconds(10)
    assert (seconds["products"], seconds["orthogonalization"]) == (5.0, 2.0)
    state.share_out_seconds(1000)
    assert (seconds["products"], seconds["orthogonalization"]) == (5.0, 2.0)
