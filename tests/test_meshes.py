"""Arrays on several devices: the same results as on one, or an error that names the array.

In processes of their own, since the number of devices is fixed once JAX runs.
"""

import subprocess
import sys

import pytest

SETUP = """
import warnings
warnings.simplefilter("error")
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import curvax as cx

def mesh_of(kind):
    return jax.make_mesh((2,), ("d",), axis_types=(kind,))

def put(tree, spec, kind=AxisType.Auto):
    return jax.device_put(tree, NamedSharding(mesh_of(kind), spec))

keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)
params = {"w": jax.random.normal(keys[0], (6, 80)), "u": jax.random.normal(keys[1], (80, 4))}
batch = jax.random.normal(keys[2], (128, 6)), jnp.arange(128) % 4
v = jax.tree.map(jnp.cos, params)

def linear(p, b):
    return cx.losses.linear_cross_entropy(jnp.tanh(b[0] @ p["w"]), p["u"].T, b[1])

def small(p, b):
    return jnp.mean(jnp.tanh(b[0] @ p) ** 2)

ones = jnp.ones(6)

def materialised(p, b):
    return cx.losses.softmax_cross_entropy(jnp.tanh(b[0] @ p["w"]) @ p["u"], b[1])

second = jax.devices()[1]
PLACES = {
    "replicated": (put(params, P()), batch),
    "data-parallel": (put(params, P()), put(batch, P("d"))),
    "sharded parameters": (put(params, P("d")), batch),
    "the second device": jax.device_put((params, batch), second),
}
ENTRIES = {
    "product": lambda op: (op @ v)["w"][:2, :2],
    "eigsh": lambda op: cx.eigsh(op, 2, seed=0, tol=1e-4).eigenvalues,
    "trace": lambda op: cx.trace(op, num_matvecs=6, seed=0).estimate,
    "warm": lambda op: cx.eigsh(op, 2, seed=0, v0=v, tol=1e-4).eigenvalues,
    "diagonal": lambda op: cx.diagonal(op, num_matvecs=6, seed=0).estimate["u"][:2],
    "power": lambda op: cx.power_iteration(op, seed=0, tol=1e-2).eigenvalues,
    "solve": lambda op: cx.solve(op, v, damping=5.0).x["u"][:2],
    "tridiagonal": lambda op: cx.lanczos_tridiagonal(op, 4, seed=0).alphas,
    "density": lambda op: cx.spectral_density(op, num_steps=5, num_runs=2, seed=0).nodes,
    "log_det": lambda op: cx.log_det(op + 5.0 * cx.identity(op), seed=0).estimate,
    "sharpness": lambda op: cx.sharpness(op, seed=0).eigenvalues,
}

def check(places, losses, entries):
    for loss in losses:
        plain = cx.hessian(loss, params, batch)
        want = {name: np.asarray(ENTRIES[name](plain), float) for name in entries}
        for place in places:
            op = cx.hessian(loss, *PLACES[place])
            for name in entries:
                try:
                    got = np.asarray(ENTRIES[name](op), float)
                except ValueError as error:
                    # XLA may shard products with parameters in shards, which no basis can hold.
                    assert place == "sharded parameters", (loss.__name__, place, name, error)
                    assert "products of the operator would come in shards" in str(error)
                    assert name not in ("product", "diagonal", "solve")
                    continue
                error = np.abs(got - want[name]).max() / np.abs(want[name]).max()
                assert error <= 1e-3, (loss.__name__, place, name, got, want[name])
        # And what was compiled for one place does not stand in the way of another.
        for name in entries:
            again = np.asarray(ENTRIES[name](cx.hessian(loss, params, batch)), float)
            assert np.array_equal(again, want[name]), name
"""

REFUSED = """
import functools
from unittest import mock
import pytest
from curvax.program import Program
from curvax.ops.block_ortho import orthonormalize_block, rotate_basis

typed = put(batch, P("d"), AxisType.Explicit)
with pytest.raises(ValueError, match=r"batch 0, array '0' must be on one device.*device_put"):
    cx.hessian(linear, params, typed)
with pytest.raises(ValueError, match=r"parameter 'w' must be .*AxisType.Auto"):
    cx.hessian(linear, {**params, "w": put(params["w"], P(None, "d"), AxisType.Explicit)}, batch)
with pytest.raises(ValueError, match=r"leaf 'u' of vector must be on one device"):
    cx.hessian(linear, params, batch) @ {**v, "u": put(v["u"], P("d"), AxisType.Explicit)}
named = "the operator's array 'function.consts.0'"
with pytest.raises(ValueError, match=f"{named} must be on one device"):
    scale = put(jnp.ones(8), P("d"), AxisType.Explicit)
    cx.eigsh(cx.from_matvec(lambda x: scale * x, 8), 1)

# Replicated over a mesh with typed axes is replicated all the same.
op = cx.hessian(materialised, put(params, P(), AxisType.Explicit), batch)
want = (cx.hessian(materialised, params, batch) @ v)["w"]
assert np.allclose((op @ v)["w"], want, rtol=1e-5, atol=1e-6)

q, w = jnp.zeros((4, 64)).at[0, 3].set(1.0), jax.random.normal(keys[0], (2, 64))

def shard_mapped(spec, impl, checked):
    step = lambda q, w: orthonormalize_block(q, w, 1, 0, impl=impl)[0]
    options = {"in_specs": spec, "out_specs": spec, "check_vma": checked}
    with jax.enable_x64(True):
        return jax.shard_map(step, mesh=mesh_of(AxisType.Auto), **options)(q, w)

for impl in ("auto", "reference"):
    for checked in (True, False):
        with pytest.raises(ValueError, match="each shard by itself: call it outside"):
            shard_mapped(P(None, "d"), impl, checked)
rows = np.asarray(shard_mapped(P(), "auto", True))[:3]
assert np.abs(rows @ rows.T - np.eye(3)).max() <= 1e-6

def orthonormalize(q, w, impl="auto"):
    return orthonormalize_block(q, w, 1, 0, impl=impl)

def rotate(q):
    return rotate_basis(q, jnp.eye(4), 3, 2)

# Concrete arrays, tracers whose type is sharded, and what only XLA knows when it compiles.
columns = P(None, "d")
with jax.enable_x64(True):
    for operands in ((put(q, columns), put(w, P())), (put(q, P()), put(w, columns))):
        with pytest.raises(ValueError, match="^(basis|block) must lie whole on every device"):
            orthonormalize(*operands)
        for call in (orthonormalize, functools.partial(orthonormalize, impl="reference")):
            with pytest.raises(jax.errors.JaxRuntimeError, match="must lie whole on every device"):
                jax.jit(call)(*operands)
    for call in (rotate, jax.jit(rotate)):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="basis must lie whole"):
            call(put(q, columns))
        with pytest.raises(ValueError, match="basis must lie whole"):
            call(put(q, columns, AxisType.Explicit))
    whole = orthonormalize(q, w)
    for call in (orthonormalize, jax.jit(orthonormalize)):
        for place in (put((q, w), P()), jax.device_put((q, w), second)):
            got = call(*place)
            assert all(np.array_equal(a, b) for a, b in zip(got, whole, strict=True))
    # Replicated, the basis is still written in place.
    step = jax.jit(orthonormalize, donate_argnums=0)
    text = step.lower(*put((q, w), P())).compile().as_text()
    assert "input_output_alias={ {0}: (0" in text and "f32[4,64]{1,0} copy(" not in text

# What names the arrays is said before any program runs.
features = put(params, P()), (put(batch[0], P(None, "d")), batch[1])
calls = [
    cx.plan,
    cx.eigsh,
    lambda op, k: cx.trace(op, num_matvecs=6, seed=0),
    lambda op, k: cx.lanczos_tridiagonal(op, 4, v0=v, reorthogonalize=True),
]
in_shards = "products of the operator would come in shards.* In shards are "
for place, names in [
    (features, r"batch array '0' P\\(None, 'd'\\): replicate"),
    (PLACES["sharded parameters"], r"parameter 'u' P\\('d',\\), parameter 'w' P\\('d',\\)"),
]:
    op = cx.hessian(materialised, *place)
    for call in calls:
        with pytest.raises(ValueError, match=in_shards + names):
            call(op, 2)
    with mock.patch.object(Program, "__call__", side_effect=AssertionError("a program runs")):
        with pytest.raises(ValueError, match=in_shards + names):
            cx.eigsh(op, 2, seed=0)
scaled = cx.from_matvec(lambda x, s=put(jnp.ones(800), P("d")): s * x, 800)
named = "the operator's array 'function.consts.0'"
with pytest.raises(ValueError, match=rf"are {named} P\\('d',\\): replicate"):
    cx.plan(scaled, 2)
# Of which the whole matrix, of rows on the host, can be formed.
want = np.linalg.eigvalsh(np.asarray(cx.hessian(small, ones, batch) @ jnp.eye(6)))
got = cx.eigsh(cx.hessian(small, put(ones, P("d")), batch), 6).eigenvalues
assert np.abs(np.sort(got) - want).max() <= 1e-5 * np.abs(want).max()
with pytest.raises(ValueError, match="a block of vectors must lie whole on every device"):
    cx.eigsh(cx.hessian(materialised, params, batch), 2, seed=0, v0=put(v, P("d")))
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", SETUP + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_data_parallel_solves_and_refusals():
    run('check(["data-parallel"], [materialised], ["product", "eigsh"])' + REFUSED)


@pytest.mark.slow
def test_every_entry_on_several_devices():
    run("check(PLACES, [linear, materialised], ENTRIES)")
