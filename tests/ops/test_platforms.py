"""Which implementation runs where: on a CPU, on a CUDA device with and without its module.

There need be no CUDA device: JAX lowers for one without, and what `_native` asks JAX is replaced.
"""

from __future__ import annotations

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import _native
from curvax._native import loading
from curvax.ops.block_ortho import api
from curvax.ops.fence import fence
from curvax.ops.matmul_sum import matmul_sum
from curvax.ops.softmax_ce import softmax_ce_derivatives, softmax_ce_hvp

KERNELS = ["softmax_ce_hvp", "softmax_ce_derivatives", "block_ortho", "rotate_basis"]
# Sizes that the module would ask for, each its own number, to be found in the program.
FAKE_CUDA = types.SimpleNamespace(
    build_info=lambda: {
        "ffi_api_minor": 3,
        "architectures": "80 90-real",
        "runtime": 13000,
        "kernels": [f"curvax.{name}" for name in KERNELS],
    },
    softmax_ce_workspace=lambda dtype, rows, vocab, tangents: 1000 * tangents + vocab,
    block_ortho_workspace=lambda dtype, rows, n, block: 2000 * block + n,
    rotate_basis_workspace=lambda rows: 3000 + rows,
)


@pytest.fixture
def on_cuda(monkeypatch):
    """As where JAX's default device is a CUDA device; the argument is curvax's module for it."""

    def set_up(module):
        load = loading.load.__wrapped__
        monkeypatch.setattr(loading, "present", lambda: frozenset({"cpu", "cuda"}))
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(loading, "load", lambda p: module if p == "cuda" else load(p))
        _native._warn_of_missing_cuda.cache_clear()

    return set_up


def lowered(function, *arguments, platform="cuda"):
    fresh = jax.jit(lambda *args: function(*args))  # not what another test has traced
    return fresh.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def softmax_arguments(dtype=np.float32):
    shape = jax.ShapeDtypeStruct
    return (
        shape((6, 301), dtype),
        shape((3, 6, 301), dtype),
        shape((6,), np.int32),
        shape((6,), np.float32),
    )


def test_platforms_have_one_name_and_their_own_workspace(on_cuda):
    on_cuda(FAKE_CUDA)
    text = lowered(softmax_ce_hvp, *softmax_arguments())
    assert "@curvax.softmax_ce_hvp" in text and "tensor<3301xui8>" in text
    assert "operand_index = 1" in text  # the products lie over the tangents
    text = lowered(softmax_ce_derivatives, *softmax_arguments(jnp.bfloat16))
    assert "@curvax.softmax_ce_derivatives" in text and "tensor<3301xui8>" in text
    basis, block = np.zeros((9, 500), np.float32), np.zeros((4, 500), np.float32)
    with jax.enable_x64(True):
        used = np.int32(2)
        text = lowered(lambda q, w, m: api.orthonormalize_block(q, w, m, 0), basis, block, used)
        assert "@curvax.block_ortho" in text and "tensor<8500xui8>" in text
        text = lowered(api.rotate_basis, basis, np.eye(9), used, used)
        assert "@curvax.rotate_basis" in text and "tensor<3009xui8>" in text


def test_kernels_of_every_platform_are_registered(on_cuda, monkeypatch):
    """Arrays may be committed to a CPU where the default device is another."""
    on_cuda(FAKE_CUDA)
    loaded, load = set(), loading.load
    monkeypatch.setattr(loading, "load", lambda p: (loaded.add(p), load(p))[1])
    assert _native.use_native("block_ortho")
    assert loaded == {"cpu", "cuda"}


def test_a_cpu_takes_no_workspace(native_kernels):
    text = lowered(softmax_ce_hvp, *softmax_arguments(), platform="cpu")
    assert "@curvax.softmax_ce_hvp" in text and "tensor<0xui8>" in text


def test_kernels_of_the_cpu_alone_are_not_called_on_cuda(on_cuda):
    on_cuda(FAKE_CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a = np.ones((4, 5), np.float32)
        assert "custom_call" not in lowered(lambda x: matmul_sum((x, x.T)), a)

    with pytest.raises(RuntimeError, match="'matmul_sum' for cuda.*none exists"):
        matmul_sum((a, a.T), impl="ffi")

    def probe(x):
        return x

    assert fence(probe) is probe


def test_without_the_module_the_reference_runs_with_one_warning(on_cuda, rng):
    on_cuda(None)
    z = jnp.asarray(rng.normal(size=(4, 30)), jnp.float32)
    labels, weights = jnp.zeros(4, jnp.int32), jnp.ones(4, jnp.float32)
    with pytest.warns(RuntimeWarning, match="CUDA device.*CURVAX_CUDA=ON") as caught:
        first = softmax_ce_hvp(z, z, labels, weights)
        second = softmax_ce_hvp(z, z, labels, weights)
    assert len(caught) == 1
    want = softmax_ce_hvp(z, z, labels, weights, impl="reference")
    assert np.array_equal(first, want) and np.array_equal(second, want)
    with pytest.raises(RuntimeError, match="'softmax_ce_hvp' for cuda.*CURVAX_CUDA=ON"):
        softmax_ce_hvp(z, z, labels, weights, impl="ffi")


def test_the_reference_asked_for_gives_no_warning(on_cuda, monkeypatch):
    on_cuda(None)
    monkeypatch.setenv("CURVAX_IMPL", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.use_native("block_ortho")


def test_the_default_device_decides(on_cuda, native_kernels):
    on_cuda(None)
    with jax.default_device(jax.devices("cpu")[0]):
        assert _native.platform() == "cpu" and _native.use_native("fence")
    assert _native.platform() == "cuda"


def test_other_platforms_have_no_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert _native.platform() == "tpu" and not _native.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.use_native("block_ortho")


@pytest.mark.parametrize(
    ("platform", "remedy"), [("cpu", "with CURVAX_NO_NATIVE=1"), ("cuda", "without CURVAX_CUDA=ON")]
)
def test_a_module_that_cannot_be_used_names_its_platform_and_remedy(monkeypatch, platform, remedy):
    monkeypatch.setattr(loading, "installed", lambda platform: True)
    monkeypatch.setattr(loading.importlib, "import_module", _no_such_library)
    with pytest.raises(ImportError, match=f"kernels for {platform} .*libcudart.*{remedy}"):
        loading.load.__wrapped__(platform)
    module = types.SimpleNamespace(build_info=lambda: {"ffi_api_minor": 99})
    monkeypatch.setattr(loading.importlib, "import_module", lambda name: module)
    with pytest.raises(ImportError, match=f"FFI API 0.99, .*{remedy}"):
        loading.load.__wrapped__(platform)


def _no_such_library(name):
    raise ImportError("libcudart.so.13: cannot open shared object file")
