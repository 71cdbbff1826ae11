"""Options, dtypes and sizes of the cross entropies, against plain JAX in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.losses.problems import EPS, OPTIONS, assert_close, make_problem

from curvax import losses


def everything(f, slots, tangents):
    """Value, gradient and Hessian product."""
    value, gradient = jax.value_and_grad(f)(slots)
    return value, gradient, jax.jvp(jax.grad(f), (slots,), (tangents,))[1]


def check(problem, kind, dtype, c=32):
    with jax.enable_x64(True):
        want = everything(problem.truth, *problem.as_dtype("float64"))
    with jax.enable_x64(dtype == "float64"):
        got = everything(problem.ours(kind), *problem.as_dtype(dtype))
        got = jax.tree.map(np.asarray, got)
    assert got[0].dtype == ("float64" if dtype == "float64" else "float32")
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, c * EPS[dtype])


@pytest.mark.thin(6)
@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, kind, rng):
    check(make_problem(rng, **options), kind, dtype)


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_narrow_hidden_states(options, dtype, rng):
    """Computed in float32: what is lost is the rounding of the results."""
    check(make_problem(rng, **options), "linear", dtype, c=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_logits(dtype, rng):
    logits = jnp.asarray(3 * rng.normal(size=(6, 301)), dtype)
    u = jnp.asarray(rng.normal(size=(6, 301)), dtype)
    labels = rng.integers(0, 301, 6)

    def truth(z):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1))

    def ours(z):
        return losses.softmax_cross_entropy(z, labels)

    with jax.enable_x64(True):
        z, v = (jnp.asarray(np.asarray(x, np.float64)) for x in (logits, u))
        want = everything(truth, z, v)
    got = everything(ours, logits, u)
    assert got[0].dtype == jnp.float32
    assert_close(got[0], want[0], 8 * EPS["float32"])
    assert_close(got[1:], want[1:], 2 * EPS[dtype])


@pytest.mark.thin(6)
@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("rows,width,vocab", [(11, 5, 7), (1, 1, 11), (9, 3, 4099), (3, 4, 151936)])
def test_sizes(rows, width, vocab, kind, rng):
    problem = make_problem(rng, max(rows, 3), width, vocab)
    if rows == 1:
        problem = one_row(problem)
    # Sums over the vocabulary are products of matrices, in float32.
    check(problem, kind, "float32", c=32 + vocab**0.5 / 2)


def one_row(problem):
    slots, tangents = ((x[0][:1], *x[1:]) for x in (problem.slots, problem.tangents))
    return type(problem)(slots, tangents, problem.labels[:1], problem.weights[:1], {})


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_masked_classes(kind, rng):
    """Logits of -inf: a class that is left out, with exact zeros."""
    problem = make_problem(rng, masked_classes=5)
    with jax.enable_x64(True):
        slots, tangents = problem.as_dtype("float64")
        finite = [x[:-5] if len(x) == 37 else x for x in (*slots, *tangents)]
        want = everything(problem.truth, tuple(finite[:3]), tuple(finite[3:]))
    got = everything(problem.ours(kind), *problem.as_dtype("float32"))
    for part in range(1, 3):
        for x in got[part][1:]:
            assert not np.any(np.asarray(x)[-5:])
    cut = jax.tree.map(lambda x: x[:-5] if x.ndim and len(x) == 37 else x, got)
    assert_close(cut, want, 32 * EPS["float32"])


@pytest.mark.thin(3)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 10, 11, 12, 1000, "auto"])
def test_chunks_do_not_change_the_answer(chunk, rng):
    problem = make_problem(rng)
    slots, tangents = problem.as_dtype("float32")

    def f(s):
        w = jnp.asarray(problem.weights, jnp.float32)
        return losses.linear_cross_entropy(
            s[0], s[1], problem.labels, bias=s[2], weights=w, chunk=chunk
        )

    want = everything(problem.ours("softmax"), slots, tangents)
    assert_close(everything(f, slots, tangents), want, 32 * EPS["float32"])


def test_leading_axes_and_no_bias(rng):
    hidden = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    labels = rng.integers(0, 7, (2, 3, 4))

    def linear(s):
        return losses.linear_cross_entropy(s[0], s[1], labels, chunk=5)

    def softmax(s):
        return losses.softmax_cross_entropy(s[0] @ s[1].T, labels)

    slots = (hidden, head)
    got, want = (everything(f, slots, (hidden[::-1], -head)) for f in (linear, softmax))
    assert_close(got, want, 16 * EPS["float32"])


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_weight_and_empty_means(kind, rng):
    problem = make_problem(rng)
    slots, _ = problem.as_dtype("float32")
    weights = jnp.asarray(problem.weights, jnp.float32)

    def f(labels, weights):
        if kind == "softmax":
            return losses.softmax_cross_entropy(
                slots[0] @ slots[1].T, labels, weights=weights, return_weight=True
            )
        return losses.linear_cross_entropy(*slots[:2], labels, weights=weights, return_weight=True)

    _, weight = f(problem.labels, weights)
    assert_close(weight, np.delete(problem.weights, 1).sum(), 4 * EPS["float32"])
    _, count = f(problem.labels, None)
    assert count == 10
    ignored = np.full_like(problem.labels, -100)
    mean, weight = f(ignored, weights)
    assert np.isnan(mean) and weight == 0
    gradient = jax.grad(
        lambda s: losses.linear_cross_entropy(s, slots[1], ignored, return_weight=True)[0]
    )(slots[0])
    assert not np.any(np.asarray(gradient))


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_labels_that_are_only_known_at_run_time(kind, rng):
    """Under jit a label out of range cannot raise: it makes the loss NaN, never a wrong number."""
    problem = make_problem(rng)
    slots, _ = problem.as_dtype("float32")

    @jax.jit
    def f(labels):
        if kind == "softmax":
            return losses.softmax_cross_entropy(slots[0] @ slots[1].T, labels)
        return losses.linear_cross_entropy(*slots[:2], labels)

    assert np.isfinite(f(problem.labels))
    for bad in (37, -1, 1 << 20):
        assert np.isnan(f(np.where(np.arange(11) == 5, bad, problem.labels).astype(np.int32)))


def test_mse(rng):
    x, y, w = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.uniform(size=6)
    f32 = [jnp.asarray(a, jnp.float32) for a in (x, y, w)]
    assert_close(losses.mse(f32[0], f32[1]), ((x - y) ** 2).mean(), 8 * EPS["float32"])
    mean, weight = losses.mse(f32[0], f32[1], weights=f32[2], return_weight=True)
    assert_close(mean, (w[:, None] * (x - y) ** 2).sum() / (3 * w.sum()), 8 * EPS["float32"])
    assert_close(weight, 3 * w.sum(), 8 * EPS["float32"])
    # At a residual of exactly zero too.
    hessian = jax.hessian(lambda t: losses.mse(t, f32[1]))(f32[1]).reshape(18, 18)
    assert_close(hessian, 2 / 18 * np.eye(18), 4 * EPS["float32"])
