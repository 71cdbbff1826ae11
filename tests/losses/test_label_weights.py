"""Weights of labels and elements: what is refused, and the ends of the range of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import losses
from curvax.operators.checked_product import compiled_product

RNG = np.random.default_rng(3)
X = RNG.standard_normal((20, 2)).astype(np.float32)
Y = RNG.integers(0, 3, 20)
PARAMS = {"w": RNG.standard_normal((3, 2)).astype(np.float32)}


def targets(batch):
    return batch[0] @ np.ones((2, 3), np.float32)


FUNCTIONS = {
    "softmax": lambda p, b: losses.softmax_cross_entropy(b[0] @ p["w"].T, b[1], weights=b[2]),
    "linear": lambda p, b: losses.linear_cross_entropy(b[0], p["w"], b[1], weights=b[2]),
    "mse": lambda p, b: losses.mse(b[0] @ p["w"].T, targets(b), weights=b[2]),
}
OBJECTS = {
    "softmax": (
        lambda p, b: b[0] @ p["w"].T,
        losses.SoftmaxCrossEntropy(lambda b: b[1], lambda b: b[2]),
    ),
    "linear": (
        lambda p, b: (b[0], p["w"]),
        losses.LinearCrossEntropy(lambda b: b[1], lambda b: b[2]),
    ),
    "mse": (lambda p, b: b[0] @ p["w"].T, losses.MeanSquaredError(targets, lambda b: b[2])),
}
OPERATORS = {
    "hessian": lambda kind, batch, **o: cx.hessian(FUNCTIONS[kind], PARAMS, batch, **o),
    "ggn": lambda kind, batch, **o: cx.ggn(*OBJECTS[kind], PARAMS, batch, **o),
    "empirical": lambda kind, batch, **o: cx.fisher(*OBJECTS[kind], PARAMS, batch, **o),
    "exact": lambda kind, batch, **o: cx.fisher(*OBJECTS[kind], PARAMS, batch, kind="exact", **o),
    "mc": lambda kind, batch, **o: cx.fisher(*OBJECTS[kind], PARAMS, batch, kind="mc", seed=0, **o),
}
losses_of_each_kind = pytest.mark.parametrize("kind", FUNCTIONS)

BAD = [-1.0, np.nan, np.inf, -np.inf, -1e-30]


def weights(*last):
    return np.r_[np.ones(20 - len(last)), last].astype(np.float32)


@losses_of_each_kind
@pytest.mark.parametrize("bad", BAD)
def test_known_weights_are_refused_alike(kind, bad):
    forward, loss = OBJECTS[kind]
    batch = (X, Y, weights(bad))
    for call in (
        lambda: FUNCTIONS[kind](PARAMS, batch),
        lambda: loss(forward(PARAMS, batch), batch),
    ):
        with pytest.raises(ValueError, match=f"finite and not negative, got {bad:g}"):
            call()


@losses_of_each_kind
@pytest.mark.parametrize("name, bad", [("hessian", -1.0), ("ggn", -1e-30), ("empirical", np.inf)])
def test_operators_refuse_them_alike(kind, name, bad):
    """Traced: NaN, which every operator refuses, and which the message explains."""
    batch = (X, Y, weights(bad))
    assert np.isnan(jax.jit(FUNCTIONS[kind])(PARAMS, batch))
    with pytest.raises((ValueError, FloatingPointError), match="on batch 0.*negative"):
        OPERATORS[name](kind, batch)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_weights_of_ignored_labels_may_be_anything(kind):
    labels = np.where(np.arange(20) < 19, Y, -100)
    value = FUNCTIONS[kind](PARAMS, (X, labels, weights(-5.0)))
    expected = FUNCTIONS[kind](PARAMS, (X[:19], labels[:19], weights()[:19]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@losses_of_each_kind
@pytest.mark.parametrize("scale", [3e38, 1e-37])
def test_the_mean_does_not_know_the_scale_of_the_weights(kind, scale):
    shares = RNG.uniform(0.2, 1, 20).astype(np.float32)
    batch = (X, Y, shares)
    scaled = (X, Y, shares * np.float32(scale))
    for f in (FUNCTIONS[kind], jax.jit(FUNCTIONS[kind]), jax.grad(FUNCTIONS[kind])):
        value, expected = (jax.tree.leaves(f(PARAMS, b))[0] for b in (scaled, batch))
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, kind, scale",
    [
        ("hessian", "softmax", 1e37),
        ("ggn", "softmax", 1e37),
        ("ggn", "linear", 1e-37),
        ("ggn", "mse", 1e36),
        ("empirical", "softmax", 1e-37),
        ("empirical", "linear", 1e37),
        ("exact", "mse", 1e-37),
        ("mc", "linear", 1e37),
    ],
)
def test_products_do_not_know_the_scale_either(name, kind, scale):
    shares = RNG.uniform(0.2, 1, 20).astype(np.float32)
    made = [
        OPERATORS[name](kind, (X, Y, shares * np.float32(s)), microbatch_size=10)
        for s in (scale, 1)
    ]
    v = jnp.ones((1, 6))
    scaled, expected = (compiled_product(op, v) for op in made)
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-6)
    if name != "hessian":  # whose plain mean weighs by its length
        np.testing.assert_allclose(made[0].weight, scale * made[1].weight, rtol=1e-5)


@losses_of_each_kind
def test_weights_whose_sum_leaves_the_range_are_named(kind):
    batch = (X, Y, np.full(20, 1e38, np.float32))
    with pytest.raises(ValueError, match=r"the weight.*must be finite.*got inf.*sum must fit"):
        OPERATORS["ggn"](kind, batch)
    # Of each microbatch it fits, and not in all.
    with pytest.raises(ValueError, match=r"must have a positive sum, which fits in float32"):
        OPERATORS["ggn"](kind, batch, microbatch_size=1)


def test_large_weights_of_a_loss_of_ones_own():
    """A product is not multiplied by them before it is divided by their sum."""

    def loss(params, batch):
        return jnp.sum(params**2) * batch[0], batch[1]

    batches = [(np.float32(3), np.float32(1e38)), (np.float32(6), np.float32(2e38))]
    op = cx.hessian(loss, jnp.float32(30), batches)
    np.testing.assert_allclose(op @ jnp.float32(1), 10, rtol=1e-6)
    np.testing.assert_allclose(op.loss, 5 * 900, rtol=1e-6)


def test_weights_of_elements_and_of_samples():
    x, t = X, np.zeros_like(X)
    by_sample = RNG.uniform(0, 1, 20).astype(np.float32)
    by_element = np.repeat(by_sample[:, None], 2, axis=1)
    expected = np.sum(by_element * x**2) / by_element.sum()
    for w, weight in ((by_sample, 2 * by_sample.sum()), (by_element, by_element.sum())):
        mean, total = losses.mse(x, t, weights=w, return_weight=True)
        np.testing.assert_allclose([mean, total], [expected, weight], rtol=1e-6)
    np.testing.assert_allclose(losses.mse(x, t, return_weight=True)[1], 40)
