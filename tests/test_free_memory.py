"""Whose memory is planned with, on devices made by hand: there is no GPU here."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import _native, memory
from curvax.krylov import forecast
from curvax.krylov.sizes import comfortable_rows
from curvax.memory import RESERVE, SHARE, available_bytes, memory_of, on_device
from curvax.operators.budget import WANTED_ROWS

GIB = 1 << 30
CARD = 139 * GIB


@dataclasses.dataclass(frozen=True, eq=False)
class FakeDevice:
    """A GPU. JAX takes any class of such a name for the default device."""

    stats: Any
    platform: str = "gpu"
    local_hardware_id: int = 3

    def memory_stats(self) -> Any:
        return self.stats


def driver(monkeypatch, free, total=CARD):
    asked: list[int] = []

    def says(ordinal):
        asked.append(ordinal)
        return (free, total)

    monkeypatch.setattr(_native, "device_memory", says)
    return asked


def allocator(limit, used=0, **more):
    return FakeDevice({"bytes_limit": limit, "bytes_in_use": used, **more})


def gpu(monkeypatch, device):
    """Arrays seem to be on it; they are computed with on the CPU all the same."""
    monkeypatch.setattr(memory, "_devices", lambda tree: {device})


class TestWhichDevice:
    def test_the_default_device_decides_and_not_the_first(self):
        with jax.default_device(allocator(9 * GIB, 2 * GIB)):
            assert available_bytes(None) == 7 * GIB and on_device(None)
        with jax.default_device("cpu"):
            assert not on_device(None) and not memory_of(None).on_device
        assert memory.default_device() == jax.local_devices()[0]

    def test_committed_arrays_decide_before_it(self):
        here = jax.device_put(jnp.ones(3), jax.devices("cpu")[0])
        free = jnp.zeros(2)
        with jax.default_device(allocator(9 * GIB)):
            assert on_device({"b": free, "c": np.ones(2), "d": "text"})
            assert not on_device(({"a": here}, free))

    def test_the_device_with_least_free_counts(self, monkeypatch):
        devices = {allocator(9 * GIB), allocator(8 * GIB, 2 * GIB)}
        monkeypatch.setattr(memory, "_devices", lambda tree: devices)
        assert available_bytes(None) == 6 * GIB


class TestFree:
    def test_shares(self, monkeypatch):
        gpu(monkeypatch, allocator(100))
        assert memory_of(None).shareable == pytest.approx(100 * (1 - RESERVE))
        gpu(monkeypatch, jax.devices("cpu")[0])
        assert memory_of(None).shareable == pytest.approx(SHARE * memory_of(None).free, rel=0.1)

    def test_without_statistics_the_driver_is_asked(self, monkeypatch):
        asked = driver(monkeypatch, 5 * GIB)
        for stats in (None, {}, {"bytes_in_use": 7}):
            gpu(monkeypatch, FakeDevice(stats))
            assert memory_of(None) == memory.Memory(5 * GIB, on_device=True)
        assert asked == [3, 3, 3]

    @pytest.mark.parametrize("platform", ["gpu", "tpu"])
    def test_never_the_hosts(self, monkeypatch, platform):
        gpu(monkeypatch, FakeDevice(None, platform))
        monkeypatch.setattr(_native, "device_memory", lambda ordinal: None)
        match = "free memory of .* is not known.*Unset that variable, or .*CURVAX_CUDA=ON"
        with pytest.raises(RuntimeError, match=match):
            available_bytes(None)

    @pytest.mark.parametrize(
        "pool, used, unused, free, foreign",
        [
            (0, 0, 138, 104, 1),  # grows: the allocator's limit is all that is in the way
            (104, 10, 34, 94, 1),  # taken at the start
            (0, 0, 29, 29, 110),  # another process has the rest
            (20, 15, 9, 14, 110),
            (60, 15, 9, 54, 70),
        ],
    )
    def test_what_others_hold_is_not_free(self, monkeypatch, pool, used, unused, free, foreign):
        driver(monkeypatch, unused * GIB)
        gpu(monkeypatch, allocator(104 * GIB, used * GIB, pool_bytes=pool * GIB))
        found = memory_of(None)
        assert (found.free, found.foreign) == (free * GIB, foreign * GIB)

    def test_without_the_module_the_allocator_is_believed(self, monkeypatch):
        monkeypatch.setattr(_native, "device_memory", lambda ordinal: None)
        gpu(monkeypatch, allocator(104 * GIB, 4 * GIB, pool_bytes=0))
        assert memory_of(None) == memory.Memory(100 * GIB, 0, on_device=True)


class TestDriver:
    def ask(self, monkeypatch, module):
        def load(platform):
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(_native.loading, "present", lambda: frozenset({"cuda", "cpu"}))
        monkeypatch.setattr(_native.loading, "load", load)
        return _native.device_memory(3)

    @pytest.mark.parametrize("free, total, found", [(5, 9, (5, 9)), (0, 9, (0, 9)), (0, 0, None)])
    def test_what_the_module_says(self, monkeypatch, free, total, found):
        facts = {3: {"free": free, "total": total}}
        module = types.SimpleNamespace(check_device=lambda ordinal: facts[ordinal])
        assert self.ask(monkeypatch, module) == found

    @pytest.mark.parametrize("module", [None, ImportError("no driver")])
    def test_no_module_to_ask(self, monkeypatch, module):
        assert self.ask(monkeypatch, module) is None


class TestPlan:
    N, SCRATCH = 1_060_000_000, 25 * 10**9

    @pytest.fixture
    def billion(self, monkeypatch):
        """The plan of ten pairs of 1.06e9 parameters, whose product takes 25 GB of its own."""
        op = cx.from_matvec(lambda v: 2 * v, self.N)
        product = forecast._product_bytes
        monkeypatch.setattr(forecast, "_product_bytes", lambda *a: self.SCRATCH + product(*a))

        def plan(limit, used=0, **options):
            gpu(monkeypatch, allocator(int(limit * CARD), used))
            return cx.plan(op, 10, basis_dtype="float16", **options)

        return plan

    @pytest.mark.usefixtures("native_kernels")
    @pytest.mark.parametrize("limit, rows", [(0.75, 36), (0.93, 48)])
    def test_a_billion_parameters_get_the_rows_that_fit(self, billion, limit, rows):
        """95 % of what is free, less product and block, over 2.12 GB."""
        plan = billion(limit)
        room = (1 - RESERVE) * int(limit * CARD) - self.SCRATCH - 4 * self.N
        assert plan.max_basis == rows == int(room / (2 * self.N))
        assert plan.fits and plan.bytes.basis == rows * 2 * self.N
        # The matrices on the host are in another memory.
        assert plan.bytes.peak == plan.bytes.basis + plan.bytes.product

    @pytest.mark.usefixtures("native_kernels")
    def test_residuals_that_are_held_leave_less(self, billion):
        held = 18 * 10**9
        assert billion(0.93, held).max_basis == int(
            ((1 - RESERVE) * (int(0.93 * CARD) - held) - self.SCRATCH - 4 * self.N) / (2 * self.N)
        )


class TestLinearize:
    """Residuals are kept where 20 rows and the scratch of a product still fit."""

    def operator(self, monkeypatch, free, count=2, linearize="auto"):
        gpu(monkeypatch, allocator(free))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(count, 256, 30)), jnp.float32)

        def loss(w, batch):
            return jnp.mean(jnp.tanh(jnp.tanh(batch @ w)) ** 2)

        return cx.hessian(loss, jnp.ones((30, 20)) / 30, iter(x), linearize=linearize)

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_what_the_basis_leaves(self, monkeypatch, count):
        kept = self.operator(monkeypatch, GIB, count, True)
        each, n = kept.residual_bytes // count, kept.shape[0]
        needed = (WANTED_ROWS * n * 2 + (count + 1) * each) / (1 - RESERVE)
        assert self.operator(monkeypatch, int(needed) + 9, count).residual_bytes == count * each
        assert self.operator(monkeypatch, int(needed) - 9, count).residual_bytes == 0

    def test_more_than_a_share(self, monkeypatch):
        kept = self.operator(monkeypatch, GIB, 40, True).residual_bytes
        assert self.operator(monkeypatch, int(1.2 * kept), 40).residual_bytes == kept

    def test_the_rows_are_those_of_ten_pairs(self):
        assert WANTED_ROWS == comfortable_rows(10, 1)

    def test_given_numbers_need_no_memory_to_be_known(self, monkeypatch):
        gpu(monkeypatch, FakeDevice(None))
        monkeypatch.setattr(_native, "device_memory", lambda ordinal: None)
        x = jnp.ones((4, 3))
        op = cx.hessian(lambda w, b: jnp.mean((b @ w) ** 4), jnp.ones(3), x, linearize=False)
        assert op.residual_bytes == 0 and cx.plan(op, 1, limit=10**6).fits


def test_a_solve_that_residuals_keep_from_fitting_says_so(monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 300)), jnp.float32)
    params = {"w": jnp.ones((300, 64)) / 30, "v": jnp.ones((64, 8)) / 8}
    loss = lambda p, b: jnp.mean(jnp.tanh(jnp.tanh(b @ p["w"]) @ p["v"]) ** 2)  # noqa: E731
    op = cx.hessian(loss, params, x, linearize=True)
    gpu(monkeypatch, allocator(GIB, GIB - 10))
    with pytest.raises(MemoryError, match=r"keep no linearisation residuals \(linearize=False\)"):
        cx.eigsh(op, 2)
