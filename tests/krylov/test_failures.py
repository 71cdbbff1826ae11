"""Memory that runs out after all, and kernels that fail: what is said, and what is kept."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator
from tests.krylov.test_storage import network_matrix

import curvax as cx
from curvax.device import programs
from curvax.krylov import failures, lanczos
from curvax.krylov import plan as planning
from curvax.krylov.lanczos import Lanczos
from curvax.memory import Memory

GONE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 25000000000 bytes."


class Failing:
    """A compiled program that fails at one of its runs, with or without its donated arguments."""

    def __init__(self, program, at, message, consumes=(), kind=jax.errors.JaxRuntimeError):
        self.program, self.at, self.consumes = program, at, consumes
        self.error = kind(message)

    def __call__(self, clock, *args):
        self.at -= 1
        if self.at == 0:
            for i in self.consumes:
                args[i].delete()
            raise self.error
        return self.program(clock, *args)

    def __getattr__(self, name):
        return getattr(self.program, name)

    def result_shardings(self, clock, *args):
        return self.program.result_shardings(clock, *args)


@pytest.fixture
def fail(monkeypatch):
    def install(name, at, message=GONE, **options):
        failing = Failing(getattr(programs, name), at, message, **options)
        monkeypatch.setattr(programs, name, failing)

    return install


def solve(error=MemoryError, op=None, k=4, **options):
    with pytest.raises(error) as caught:
        cx.eigsh(network_matrix(301)[1] if op is None else op, k, seed=0, max_basis=40, **options)
    return caught.value


def dense_matrix():
    rows = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    return rows + rows.T


class TestMessage:
    def test_forecast_and_remedy(self, fail):
        fail("multiply", 9)
        error = solve()
        plan = cx.plan(network_matrix(301)[1], 4, max_basis=40, basis_dtype=None)
        text = str(error)
        assert text.startswith(f"memory ran out after 8 products ({GONE}): ")
        assert re.search(r"[\d.]+ GB are free\. lower max_basis \(at least 8\), store the", text)
        # Of the table all but what is free, which has changed.
        table = [line for line in str(plan).splitlines() if "limit" not in line]
        assert all(line in text for line in table)
        assert isinstance(error.__cause__, jax.errors.JaxRuntimeError)

    def test_what_another_process_holds(self, fail, monkeypatch):
        fail("multiply", 2)
        short = Memory(3 * 10**9, 110 * 10**9, on_device=True)
        monkeypatch.setattr(failures, "memory_of", lambda op: short)
        text = str(solve())
        assert "3.00 GB are free" in text
        assert "end the other process that holds 110.0 GB of the device (nvidia-smi" in text
        assert "XLA_CLIENT_MEM_FRACTION=.93" in text

    def test_the_same_before_the_solve(self, monkeypatch):
        short = Memory(1000, 110 * 10**9, on_device=True)
        monkeypatch.setattr(planning, "memory_of", lambda op: short)
        text = str(solve())
        assert "end the other process that holds 110.0 GB" in text
        # A product alone takes more than the 1000 bytes.
        for useless in ("max_basis (", "basis_dtype", "lower k"):
            assert useless not in text

    def test_what_shrinks_a_product(self, monkeypatch):
        monkeypatch.setattr(planning, "memory_of", lambda op: Memory(100))
        batch = {"x": jnp.ones((12, 9))}

        def loss(params, batch):
            return jnp.mean(jnp.sin(batch["x"] @ params) ** 2)

        def remedies(**options):
            op = cx.hessian(loss, jnp.ones(9), batch, **options)
            text = str(solve(op=op, k=1, block_size=2))
            return text.partition(" are free: ")[2].partition(". The forecast")[0]

        fewer = "lower the number of parameters by a filter (where=)"
        smaller = "take smaller microbatches (microbatch_size below 6)"
        kept = "keep no linearisation residuals (linearize=False)"
        assert remedies(microbatch_size=6, linearize=False) == (
            f"lower block_size, {smaller}, or {fewer}"
        )
        assert remedies(microbatch_size=1, linearize=True) == (
            f"lower block_size, {kept}, take shorter samples, or {fewer}"
        )

    def test_the_forecast_comes_before_the_small_matrices(self):
        """Of 8e14 bytes each; and a basis whose bytes overflow would end the process in XLA."""
        op = cx.from_matvec(lambda v: 2 * v, 10**7)
        with pytest.raises(MemoryError, match=r"the solve needs [67]\d{6}\..* lower max_basis"):
            cx.eigsh(op, 2, max_basis=10**8)
        op = cx.from_matvec(lambda v: 2 * v, 2**48)
        with pytest.raises(MemoryError, match="a basis of 4096 vectors of 281474976710656 numbers"):
            cx.eigsh(op, 2, max_basis=4096)

    def test_the_small_matrices_beside_a_device(self, monkeypatch):
        monkeypatch.setattr(planning, "on_device", lambda op: True)
        monkeypatch.setattr(planning, "host_bytes", lambda: 7 * 8 * 40**2 - 1)
        text = str(solve())
        assert "the small matrices of the solve need 89.60 kB on the host, but 89.60 kB" in text
        assert "lower max_basis (40)" in text
        monkeypatch.setattr(planning, "host_bytes", lambda: 7 * 8 * 40**2)
        cx.eigsh(network_matrix(301)[1], 4, seed=0, max_basis=40)

    def test_of_a_program_that_had_run_before(self, fail):
        """JAX raises a plain ValueError then, as it does for a product on the host."""
        fail("multiply", 9, kind=ValueError)
        error = solve()
        assert str(error).startswith(f"memory ran out after 8 products ({GONE}): ")
        assert (error.result.num_matvecs, error.result.num_verification) == (8, 0)
        fail("multiply", 9, "x must be positive: 2", kind=ValueError)
        assert str(solve(ValueError)) == "x must be positive: 2"

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_memory_that_a_product_in_python_lacks(self, wrapped):
        calls = itertools.count(1)

        def product(v):
            if next(calls) == 5:
                raise MemoryError("mine")
            return np.float32(2) * v

        op = LinearOperator((50, 50), matvec=product, dtype=np.float32)
        if wrapped:
            like = jax.ShapeDtypeStruct((50,), jnp.float32)
            op = cx.from_matvec(lambda v: jax.pure_callback(product, like, v), like)
        error = solve((MemoryError, RuntimeError, ValueError), op=op, block_size=1)
        if not wrapped:
            assert type(error) is MemoryError and str(error) == "mine"
        (note,) = error.__notes__
        assert "4 eigenpairs of 50 parameters from a basis of 40 vectors" in note

    def test_a_basis_that_cannot_be_allocated(self, monkeypatch):
        """In XLA's own words."""
        monkeypatch.setattr(Lanczos, "__init__", lambda *args: jnp.zeros((1 << 20, 1 << 24)))
        error = solve()
        match = r"memory ran out before the first product .RESOURCE_EXHAUSTED.*70368744177664 bytes"
        assert re.match(match, str(error)) and error.result is None

    def test_a_kernel(self, fail):
        message = "INTERNAL: curvax.block_ortho: invalid device function"
        fail("orthonormalize", 6, message)
        error = solve(RuntimeError)
        assert not isinstance(error, jax.errors.JaxRuntimeError)
        assert f"a compiled kernel failed after 4 products ({message})" in str(error)
        assert "set CURVAX_IMPL=reference" in str(error) and "The forecast:" in str(error)
        assert len(error.result.eigenvalues) == 4

    def test_memory_that_a_kernel_lacks(self, fail):
        fail("orthonormalize", 6, "INTERNAL: curvax.block_ortho: out of memory")
        assert "memory ran out after 4 products" in str(solve())

    def test_other_errors_are_left_alone(self, fail):
        fail("multiply", 3, "INTERNAL: something else")
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            cx.eigsh(network_matrix(301)[1], 4, seed=0)


class TestKept:
    """What Ctrl-C would have kept: values, vectors and history, if the basis is still there."""

    def unmeasured(self, result, products, full=None):
        full = network_matrix(301)[0] if full is None else full
        assert result.interrupted and not result.converged.any()
        assert (result.num_matvecs, result.num_verification) == (products, 0)
        assert len(result.history) == products
        assert np.isnan(result.residuals).all()
        vectors = np.asarray(result.eigenvectors, np.float64)
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-5)
        quotients = np.einsum("ki,ij,kj->k", vectors, full, vectors)
        scale = np.abs(result.eigenvalues).max()
        np.testing.assert_allclose(result.eigenvalues, quotients, rtol=0, atol=1e-5 * scale)

    @pytest.mark.parametrize("name, at", [("multiply", 9), ("orthonormalize", 10)])
    def test_in_a_step(self, fail, name, at):
        fail(name, at)
        self.unmeasured(solve().result, 8)

    def test_with_steps_under_way(self, fail, monkeypatch):
        monkeypatch.setattr(lanczos, "on_device", lambda op: True)
        monkeypatch.setattr(lanczos, "_SHORT", 0.0)
        fail("multiply", 9)
        # The eighth was given and not read.
        self.unmeasured(solve().result, 7)

    def test_after_a_restart(self, fail):
        fail("multiply", 12)
        with pytest.raises(MemoryError) as caught:
            cx.eigsh(network_matrix(301)[1], 4, seed=0, max_basis=9, tol=1e-6)
        assert caught.value.result.num_restarts > 0
        self.unmeasured(caught.value.result, 11)

    def test_of_an_operator_that_was_scaled(self, fail):
        full, op = network_matrix(301)
        # Found out of range in the first product, and by two more how to scale.
        fail("multiply", 14)
        result = solve(op=2.0**-100 * op).result
        assert result.num_matvecs > 4
        self.unmeasured(result, result.num_matvecs, 2.0**-100 * full)

    def test_values_where_the_basis_is_lost(self, fail):
        fail("orthonormalize", 10, consumes=(0,))
        lost = solve().result
        assert lost.eigenvectors is None and np.isnan(lost.orthogonality)
        fail("multiply", 9)
        np.testing.assert_array_equal(lost.eigenvalues, solve().result.eigenvalues)

    def test_pairs_that_were_not_yet_measured(self, fail):
        whole = cx.eigsh(network_matrix(301)[1], 4, seed=0, max_basis=40)
        fail("residuals", 3)
        result = solve().result
        np.testing.assert_allclose(result.eigenvalues, whole.eigenvalues, rtol=1e-6)
        # Those of largest magnitude are measured first.
        measured = np.argsort(-np.abs(whole.eigenvalues))[:2]
        np.testing.assert_array_equal(result.residuals[measured], whole.residuals[measured])
        assert list(np.flatnonzero(result.converged)) == sorted(measured)
        assert np.isnan(np.delete(result.residuals, measured)).all()
        assert result.eigenvectors is not None and result.interrupted
        assert (result.num_matvecs, result.num_verification) == (whole.num_matvecs, 3)

    def test_the_rows_of_a_whole_matrix(self, fail):
        matrix = dense_matrix()
        fail("multiply", 9)
        error = solve(op=matrix, k=3)
        assert str(error).startswith(f"memory ran out after 8 products ({GONE}): ")
        result, known = error.result, np.linalg.eigvalsh(matrix[:8, :8].astype(np.float64))
        assert (result.num_matvecs, result.num_verification) == (8, 0)
        assert result.interrupted and result.complete is None
        assert not result.converged.any() and np.isnan(result.residuals).all()
        wanted = known[np.argsort(-np.abs(known))[:3]]
        np.testing.assert_allclose(result.eigenvalues, np.sort(wanted)[::-1], rtol=1e-5)

    def test_what_was_verified_of_a_whole_matrix(self, fail):
        matrix = dense_matrix()
        whole = cx.eigsh(matrix, 3, seed=0, max_basis=40)
        fail("multiply", 23)
        error = solve(op=matrix, k=3)
        assert "memory ran out after 22 products" in str(error)
        result = error.result
        assert (result.num_matvecs, result.num_verification) == (20, 2)
        assert result.complete is None and result.interrupted
        np.testing.assert_allclose(result.eigenvalues, whole.eigenvalues, rtol=1e-6)
        measured = np.sort(np.argsort(-np.abs(whole.eigenvalues))[:2])
        np.testing.assert_array_equal(np.flatnonzero(result.converged), measured)
        np.testing.assert_array_equal(result.residuals[measured], whole.residuals[measured])
        assert np.isnan(np.delete(result.residuals, measured)).all()

    def test_nothing_of_a_whole_matrix(self, fail):
        fail("multiply", 1)
        error = solve(op=dense_matrix(), k=3)
        assert "memory ran out after 0 products" in str(error) and error.result is None

    @pytest.mark.parametrize("name", ["take", "deliver"])
    def test_what_was_certified_without_room_for_the_vectors(self, fail, name):
        whole = cx.eigsh(network_matrix(301)[1], 4, seed=0, max_basis=40)
        fail(name, 1)
        result = solve().result
        for part in ("eigenvalues", "residuals", "converged"):
            np.testing.assert_array_equal(getattr(result, part), getattr(whole, part))
        assert result.all_converged and result.num_matvecs == whole.num_matvecs
        assert result.num_verification == whole.num_verification

    @pytest.mark.parametrize("max_basis", [40, 9])
    def test_what_a_search_for_more_had_begun_with(self, fail, max_basis):
        """Its restarts turn the rows of the pairs."""
        op = network_matrix(301)[1]
        options = {"seed": 0, "max_basis": max_basis}
        whole = cx.eigsh(op, 4, **options)
        fail("multiply", whole.num_matvecs + whole.num_verification + 9)
        with pytest.raises(MemoryError) as caught:
            cx.eigsh(op, 4, certify="complete", **options)
        result = caught.value.result
        np.testing.assert_array_equal(result.residuals, whole.residuals)
        assert result.all_converged and result.complete is None
        assert (result.eigenvectors is None) == (max_basis == 9)
