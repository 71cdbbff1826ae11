"""The cross entropies under JAX's transformations, against plain JAX in float64."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.losses.problems import EPS, OPTIONS, assert_close, make_problem

import curvax as cx
from curvax import losses


def stack(tree):
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), tree)


def scanned(f):
    """A loss inside a scan, whose body depends on the loop's counter."""

    def total(slots):
        def add(total, t):
            scaled = jax.tree.map(lambda x: x * jnp.cos(t).astype(x.dtype), slots)
            return total + f(scaled), None

        return jax.lax.scan(add, jnp.zeros((), slots[0].dtype), jnp.arange(2.0))[0]

    return total


def hvp(f, s, v):
    return jax.jvp(jax.grad(f), (s,), (v,))[1]


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))


MODES = {
    "value": lambda f, s, v: f(s),
    "grad": lambda f, s, v: jax.grad(f)(s),
    "value_and_grad": lambda f, s, v: jax.value_and_grad(f)(s),
    "jvp_grad": hvp,
    "grad_jvp": lambda f, s, v: jax.grad(lambda t: jax.jvp(f, (t,), (v,))[1])(s),
    "grad_grad": lambda f, s, v: jax.grad(lambda t: inner(jax.grad(f)(t), v))(s),
    "vjp_grad": lambda f, s, v: jax.vjp(jax.grad(f), s)[1](v),
    "linearize": lambda f, s, v: jax.linearize(jax.grad(f), s)[1](v),
    "jit_linearize": lambda f, s, v: jax.jit(lambda t: jax.linearize(jax.grad(f), t)[1])(s)(v),
    "linear_transpose": lambda f, s, v: jax.linear_transpose(jax.linearize(jax.grad(f), s)[1], s)(
        v
    ),
    "jit": jax.jit(hvp, static_argnums=0),
    "vmap_tangents": lambda f, s, v: jax.vmap(lambda u: hvp(f, s, u))(stack(v)),
    "vmap_linearized": lambda f, s, v: jax.vmap(jax.linearize(jax.grad(f), s)[1])(stack(v)),
    "vmap_one_slot": lambda f, s, v: jax.vmap(lambda u: hvp(f, s, (u, *v[1:])))(stack(v[0])),
    "vmap_slots": lambda f, s, v: jax.vmap(lambda t: hvp(f, t, v))(stack(s)),
    "vmap_vmap": lambda f, s, v: jax.vmap(jax.vmap(lambda u: hvp(f, s, u)))(stack(stack(v))),
    "hessian": lambda f, s, v: jax.hessian(lambda c: f((*s[:2], c)))(s[2]),
    "hidden_alone": lambda f, s, v: hvp(lambda x: f((x, *s[1:])), s[0], v[0]),
    "head_alone": lambda f, s, v: hvp(lambda w: f((s[0], w, s[2])), s[1], v[1]),
    "mixed_block": lambda f, s, v: jax.jvp(
        lambda x: jax.grad(lambda w: f((x, w, s[2])))(s[1]), (s[0],), (v[0],)
    )[1],
    "checkpoint": lambda f, s, v: hvp(jax.checkpoint(f), s, v),
    "checkpoint_linearize": lambda f, s, v: jax.linearize(jax.grad(jax.checkpoint(f)), s)[1](v),
    "scan": lambda f, s, v: hvp(scanned(f), s, v),
    "scan_linearize": lambda f, s, v: jax.linearize(jax.grad(scanned(f)), s)[1](v),
    "scan_checkpoint": lambda f, s, v: hvp(scanned(jax.checkpoint(f)), s, v),
    "scan_grad_grad": lambda f, s, v: jax.grad(lambda t: inner(jax.grad(scanned(f))(t), v))(s),
}


# Both kinds go through the same rules: for one of them, those that differ from the others little.
QUICK = "value grad jvp_grad grad_jvp linearize jit vmap_tangents checkpoint scan".split()
NESTED = ("vmap_vmap", "scan_checkpoint", "scan_grad_grad")  # of modes that are tested alone
CASES = [
    pytest.param(mode, "linear", marks=pytest.mark.slow if mode in NESTED else ()) for mode in MODES
] + [
    pytest.param(mode, "softmax", marks=() if mode in QUICK else pytest.mark.slow) for mode in MODES
]


@pytest.mark.thin(6)
@pytest.mark.parametrize("mode,kind", CASES)
def test_mode(mode, kind, rng):
    problem = make_problem(rng, **OPTIONS["everything"])
    with jax.enable_x64(True):
        want = MODES[mode](problem.truth, *problem.as_dtype("float64"))
    got = MODES[mode](problem.ours(kind), *problem.as_dtype("float32"))
    assert_close(got, want, 32 * EPS["float32"])


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_directional_derivatives(kind, rng):
    """Their scale is that of the terms that they sum."""
    problem = make_problem(rng)
    with jax.enable_x64(True):
        slots, tangents = problem.as_dtype("float64")
        want = jax.jvp(problem.truth, (slots,), (tangents,))[1]
        second = jax.jvp(
            lambda s: jax.jvp(problem.truth, (s,), (tangents,))[1], (slots,), (tangents,)
        )[1]
        terms = [
            sum(float(jnp.sum(jnp.abs(g * v))) for g, v in zip(x, tangents, strict=True))
            for x in (jax.grad(problem.truth)(slots), hvp(problem.truth, slots, tangents))
        ]
    slots, tangents = problem.as_dtype("float32")
    f = problem.ours(kind)
    got = jax.jvp(f, (slots,), (tangents,))[1]
    assert_close(got, want, 32 * EPS["float32"], scale=terms[0])
    got = jax.jvp(lambda s: jax.jvp(f, (s,), (tangents,))[1], (slots,), (tangents,))[1]
    assert_close(got, second, 32 * EPS["float32"], scale=terms[1])


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_second_derivatives_are_symmetric(kind, rng):
    problem = make_problem(rng, **OPTIONS["everything"])
    slots, u = problem.as_dtype("float32")
    v = jax.tree.map(lambda x: jnp.flip(x, 0), u)
    apply = jax.linearize(jax.grad(problem.ours(kind)), slots)[1]
    a, b = float(inner(u, apply(v))), float(inner(v, apply(u)))
    scale = float(inner(jax.tree.map(jnp.abs, u), jax.tree.map(jnp.abs, apply(v))))
    assert abs(a - b) <= 16 * EPS["float32"] * scale


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_a_third_derivative_is_refused(kind, rng):
    problem = make_problem(rng)
    slots, v = problem.as_dtype("float32")

    def third(s):
        return hvp(problem.ours(kind), s, v)

    with pytest.raises(NotImplementedError, match="differentiable twice.*third derivative"):
        jax.jvp(third, (slots,), (v,))
    with pytest.raises(NotImplementedError, match="third derivative"):
        jax.jit(jax.grad(lambda s: inner(third(s), v)))(slots)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_products_of_operators_refuse_a_third_derivative(kind, curvature, rng):
    """Through fences too; in the vector, in which they are linear, they have a derivative."""
    x, y = jnp.asarray(rng.normal(size=(90, 64)), jnp.float32), jnp.arange(90) % 7
    w = jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32)
    head = jnp.asarray(rng.normal(size=(7, 64)) / 8, jnp.float32)

    def forward(w, batch):
        hidden = jnp.tanh(jnp.tanh(batch[0] @ w) @ w)
        return hidden @ head.T if kind == "softmax" else (hidden, head)

    def loss(outputs, batch):
        if kind == "softmax":
            return losses.softmax_cross_entropy(outputs, batch[1])
        return losses.linear_cross_entropy(*outputs, batch[1])

    def product(w, v):
        if curvature == "ggn":
            return cx.ggn(forward, loss, w, (x, y)) @ v
        return cx.hessian(lambda w, batch: loss(forward(w, batch), batch), w, (x, y)) @ v

    with pytest.raises(NotImplementedError, match="third derivative"):
        jax.grad(lambda p: jnp.vdot(w, product(p, w)))(w)
    v = jnp.sin(w)
    along = jax.grad(lambda v: jnp.vdot(w, product(w, v)))(v)
    assert_close((along,), (product(w, w),), 1e-5)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_weights_are_not_differentiated(kind, rng):
    problem = make_problem(rng)
    slots, _ = problem.as_dtype("float32")
    logits = slots[0] @ slots[1].T

    def of_weights(w):
        if kind == "softmax":
            return losses.softmax_cross_entropy(logits, problem.labels, weights=w)
        return losses.linear_cross_entropy(*slots[:2], problem.labels, weights=w)

    with pytest.raises(TypeError, match="not differentiable in its labels and weights.*stop_grad"):
        jax.grad(of_weights)(jnp.asarray(problem.weights, jnp.float32))


SHARDED = """
import warnings
warnings.simplefilter("error")
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from curvax import losses

mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
shapes = [(14, 5), (37, 5)]
s, v = (tuple(jnp.asarray(rng.normal(size=n), jnp.float32) for n in shapes) for _ in range(2))
labels = jnp.asarray(rng.integers(0, 37, 14))

def plain(s):
    picked = jnp.take_along_axis(jax.nn.log_softmax(s[0] @ s[1].T), labels[:, None], 1)
    return -jnp.mean(picked)

kinds = {
    "linear": lambda x, w, y: losses.linear_cross_entropy(x, w, y, chunk=3),
    "softmax": lambda x, w, y: losses.softmax_cross_entropy(x @ w.T, y),
}
modes = [
    lambda f: f(s),
    lambda f: jax.grad(f)(s),
    lambda f: jax.jvp(jax.grad(f), (s,), (v,)),
    lambda f: jax.vjp(jax.grad(f), s)[1](v),
    lambda f: jax.linearize(jax.grad(f), s)[1](v),
    lambda f: jax.vmap(jax.linearize(jax.grad(f), s)[1])(jax.tree.map(lambda x: x[None], v)),
]
specs = P("d"), P(), P("d")
for kind, fun in kinds.items():
    for check in (True, False):
        mean = lambda x, w, y: jax.lax.pmean(fun(x, w, y), "d")
        f = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
        for i, mode in enumerate(modes if check else modes[2:3]):
            got = jax.tree.leaves(jax.jit(lambda: mode(lambda s: f(*s, labels)))())
            for a, b in zip(got, jax.tree.leaves(mode(plain)), strict=True):
                error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
                assert error < 5e-6, (kind, check, i, error)

    def inside(x, w, y, vx, vw):
        mean = lambda s: jax.lax.pmean(fun(*s, y), "d")
        return jax.jvp(jax.grad(mean), ((x, w),), ((vx, vw),))[1]

    f = jax.shard_map(inside, mesh=mesh, in_specs=(*specs, *specs[:2]), out_specs=specs[:2])
    for a, b in zip(f(*s, labels, *v), jax.jvp(jax.grad(plain), (s,), (v,))[1], strict=True):
        assert jnp.abs(a - b).max() < 5e-6 * jnp.abs(b).max(), kind
"""


@pytest.mark.slow
def test_shard_map_on_two_devices():
    """In a process of its own: the number of devices is fixed once JAX runs."""
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_weight_of_zero_hides_an_infinite_loss(rng):
    logits = np.array([[0.0, -np.inf, 1.0], [0.5, 0.2, 0.1]], np.float32)
    labels, weights = np.array([1, 2]), np.array([0.0, 2.0], np.float32)
    got = losses.softmax_cross_entropy(logits, labels, weights=weights)
    want = np.log(np.exp(logits[1].astype(np.float64)).sum()) - logits[1, 2]
    assert_close(got, want, 4 * EPS["float32"])
