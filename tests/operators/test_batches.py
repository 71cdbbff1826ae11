"""How the data are cut changes no operator: batches, microbatches, `num_batches`, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.operators.test_ggn import labels_of, logits, problem  # noqa: F401

import curvax as cx
from curvax import losses

# Two stand for the others by default.
KINDS = ("hessian", "fisher, mc")

# Relative to the norm: what float32 sums in another order may differ by.
SAME = 1e-6


def _mean(params, batch):
    return LOSS(logits(params, batch), batch)


LOSS = losses.SoftmaxCrossEntropy(labels_of)
OPERATORS = {
    "hessian": lambda params, batches, **cut: cx.hessian(_mean, params, batches, **cut),
    "hessian, not linearised": lambda params, batches, **cut: cx.hessian(
        _mean, params, batches, linearize=False, **cut
    ),
    "ggn": lambda params, batches, **cut: cx.ggn(logits, LOSS, params, batches, **cut),
    "fisher, empirical": lambda params, batches, **cut: cx.fisher(
        logits, LOSS, params, batches, **cut
    ),
    "fisher, exact": lambda params, batches, **cut: cx.fisher(
        logits, LOSS, params, batches, kind="exact", **cut
    ),
    "fisher, mc": lambda params, batches, **cut: cx.fisher(
        logits, LOSS, params, batches, kind="mc", num_samples=3, seed=1, **cut
    ),
}


kinds = pytest.mark.parametrize(
    "kind",
    [x if x in KINDS else pytest.param(x, marks=pytest.mark.slow) for x in OPERATORS],
)


def _cut(batch, *sizes):
    """The first batches, of these sizes."""
    borders = np.cumsum([0, *sizes])
    return [
        jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
        for a, b in zip(borders[:-1], borders[1:], strict=True)
    ]


def _difference(op, expected):
    v = jax.random.normal(jax.random.key(0), (3, op.shape[0]))
    a, b = (np.asarray(x.product(v), np.float64) for x in (op, expected))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.thin(6)
@kinds
@pytest.mark.parametrize("sizes, microbatch", [((7, 13), None), ((20,), 6), ((11, 9), 4)])
def test_ragged_batches_of_masked_labels(kind, sizes, microbatch, problem):  # noqa: F811
    """One label of the first batch is ignored: a mean of the batches' means would be wrong."""
    params, batch = problem
    whole = OPERATORS[kind](params, batch)
    op = OPERATORS[kind](params, _cut(batch, *sizes), microbatch_size=microbatch)
    assert _difference(op, whole) <= SAME
    np.testing.assert_allclose(op.loss, whole.loss, rtol=SAME)
    assert op.weight == whole.weight == 19


@pytest.mark.thin(4)
@kinds
def test_num_batches(kind, problem):  # noqa: F811
    """The first two of three, and no more is read."""
    params, batch = problem
    read = []

    def loader():
        for piece in _cut(batch, 7, 8, 5):
            read.append(len(piece[1]))
            yield piece

    op = OPERATORS[kind](params, loader(), num_batches=2)
    assert read == [7, 8]
    assert _difference(op, OPERATORS[kind](params, _cut(batch, 15)[0])) <= SAME
    # And the third would have made a difference.
    assert _difference(op, OPERATORS[kind](params, batch)) > 0.01


@kinds
def test_unused_parameters_give_zero_rows(kind, problem):  # noqa: F811
    params, batch = problem
    unused = {"between": jnp.ones(3), **params, "last": jnp.ones((2, 2))}
    op, own = OPERATORS[kind](unused, batch), OPERATORS[kind](params, batch)
    v = jax.random.normal(jax.random.key(0), (op.shape[0],))
    out = op @ op.unravel(v)
    assert not np.any(out["between"]) and not np.any(out["last"])
    expected = own @ {name: op.unravel(v)[name] for name in params}
    for name in params:
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-5, atol=1e-7)
