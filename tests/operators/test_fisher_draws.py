"""The Fisher matrices of drawn labels: their mean, their spread, and what they depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.operators.fisher_problems import (
    CASES,
    EPS,
    dense,
    labels_of,
    logits,
    make_batch,
    mean_of_any,
    no_logits,
    ours,
    small_params,  # noqa: F401 - the fixture
)

import curvax as cx
from curvax import losses


class Sampled:
    """A loss of one's own that draws labels."""

    def __call__(self, outputs, batch):
        return mean_of_any(outputs, batch)

    def sample(self, outputs, batch, key):
        drawn = jax.random.categorical(key, outputs).astype(jnp.int32)
        return {**batch, "labels": jnp.where(batch["labels"] == -100, -100, drawn)}


MC_CASES = {
    "fused object": (logits, losses.SoftmaxCrossEntropy(labels_of, z_loss=0.3)),
    "no logits": (no_logits, losses.LinearCrossEntropy(labels_of, chunk=7, label_smoothing=0.5)),
    "sample": (logits, Sampled()),
}


@pytest.mark.parametrize(
    "case",
    [x if x == "fused object" else pytest.param(x, marks=pytest.mark.slow) for x in MC_CASES],
)
def test_draws_are_unbiased(case, params, rng):
    """The error of 4096 draws is that of 16, divided by 16; see also `test_fisher_products.py`."""
    forward, loss = MC_CASES[case]
    batch = make_batch(rng, 5, 3, weights=False)
    options = {"where": cx.match_names("w"), "seed": 7, "kind": "mc"}
    exact = dense(cx.fisher(logits, ours, params, batch, kind="exact", where=options["where"]))
    few, many = (
        np.linalg.norm(
            dense(cx.fisher(forward, loss, params, batch, num_samples=s, **options)) - exact
        )
        for s in (16, 4096)
    )
    assert few / 64 <= many <= few / 4
    assert few >= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("case", ["no logits", pytest.param("sample", marks=pytest.mark.slow)])
def test_draws_depend_on_the_seed_and_the_sample_alone(case, params, rng):
    forward, loss = MC_CASES[case]
    # Two equal batches: their labels are to be drawn independently.
    batch = make_batch(rng, 5, 3, weights=False)
    joined = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)

    def matrix(batches, seed=3, loss=loss, **options):
        options |= {"kind": "mc", "num_samples": 2, "seed": seed}
        return dense(cx.fisher(forward, loss, params, batches, **options))

    want = matrix([batch, batch], linearize=True)
    if case == "no logits":
        loss = dataclasses.replace(loss, chunk=4)
    got = matrix(joined, loss=loss, microbatch_size=2, linearize=False)
    assert np.abs(got - want).max() <= 32 * EPS * np.abs(want).max()
    for other in (matrix(batch), matrix([batch, batch], seed=4)):
        assert np.abs(other - want).max() >= 1e-2 * np.abs(want).max()


def test_the_same_labels_with_and_without_logits(params, rng):
    batch = make_batch(rng, 5, 3)
    got, want = (
        dense(cx.fisher(forward, loss, params, batch, kind="mc", seed=5))
        for forward, loss in (CASES["no logits"], CASES["fused object"])
    )
    assert np.abs(got - want).max() <= 32 * EPS * np.abs(want).max()


def test_a_drawn_seed_is_recorded(params, rng):
    batch = make_batch(rng, 5)
    op = cx.fisher(logits, ours, params, batch, kind="mc", num_samples=3)
    assert (op.kind, op.num_samples) == ("mc", 3)
    again = cx.fisher(logits, ours, params, batch, kind="mc", num_samples=3, seed=op.seed)
    np.testing.assert_array_equal(dense(op), dense(again))
