"""Memory that runs out after all, and kernels that fail: what is said, and what is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.krylov.test_storage import network_matrix

import curvax as cx
from curvax.device import programs
from curvax.krylov import failures, lanczos, settings
from curvax.krylov import plan as planning
from curvax.krylov.lanczos import Lanczos
from curvax.memory import Memory

GONE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 25000000000 bytes."


class Failing:
    """A compiled program that fails at one of its runs, with or without its donated arguments."""

    def __init__(self, program, at, message, consumes=()):
        self.program, self.at, self.message, self.consumes = program, at, message, consumes

    def __call__(self, clock, *args):
        self.at -= 1
        if self.at == 0:
            for i in self.consumes:
                args[i].delete()
            raise jax.errors.JaxRuntimeError(self.message)
        return self.program(clock, *args)

    def work_bytes(self, clock, *args):
        return self.program.work_bytes(clock, *args)


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
        for module in (planning, settings):
            monkeypatch.setattr(module, "memory_of", lambda op: short)
        assert "end the other process that holds 110.0 GB" in str(solve())

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
        assert result.num_matvecs == (products, 0) and len(result.history) == products
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
        assert result.num_matvecs.solve > 4
        self.unmeasured(result, result.num_matvecs.solve, 2.0**-100 * full)

    def test_values_where_the_basis_is_lost(self, fail):
        fail("orthonormalize", 10, consumes=(0,))
        lost = solve().result
        assert lost.eigenvectors is None and np.isnan(lost.orthogonality)
        fail("multiply", 9)
        np.testing.assert_array_equal(lost.eigenvalues, solve().result.eigenvalues)

    def test_pairs_that_were_not_yet_measured(self, fail):
        whole = cx.eigsh(network_matrix(301)[1], 4, seed=0, max_basis=40)
        fail("residuals", 2)
        result = solve().result
        np.testing.assert_allclose(result.eigenvalues, whole.eigenvalues, rtol=1e-6)
        assert np.isnan(result.residuals).all() and result.eigenvectors is not None

    @pytest.mark.parametrize("name", ["take", "deliver"])
    def test_what_was_certified_without_room_for_the_vectors(self, fail, name):
        whole = cx.eigsh(network_matrix(301)[1], 4, seed=0, max_basis=40)
        fail(name, 1)
        result = solve().result
        for part in ("eigenvalues", "residuals", "converged"):
            np.testing.assert_array_equal(getattr(result, part), getattr(whole, part))
        assert result.all_converged and result.num_matvecs == whole.num_matvecs

    @pytest.mark.parametrize("max_basis", [40, 9])
    def test_what_a_search_for_more_had_begun_with(self, fail, max_basis):
        """Its restarts turn the rows of the pairs."""
        op = network_matrix(301)[1]
        options = {"seed": 0, "max_basis": max_basis}
        whole = cx.eigsh(op, 4, **options)
        fail("multiply", sum(whole.num_matvecs) + 9)
        with pytest.raises(MemoryError) as caught:
            cx.eigsh(op, 4, certify="complete", **options)
        result = caught.value.result
        np.testing.assert_array_equal(result.residuals, whole.residuals)
        assert result.all_converged and result.complete is None
        assert (result.eigenvectors is None) == (max_basis == 9)
