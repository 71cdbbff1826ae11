"""Which models keep samples apart, and the gradients that are kept of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.operators.fisher_problems import dense
from tests.operators.sample_problems import APART, MIXED, SAMPLES, make_batch, make_params, model

import curvax as cx

ours = cx.losses.SoftmaxCrossEntropy(lambda batch: batch["labels"])


def gradients_kept(op, samples=SAMPLES):
    return op.residual_bytes == samples * op.shape[0] * op.dtype.itemsize


def pair(layer, rng, loss=ours, **options):
    """The operator, and that which keeps nothing, in float64."""
    params, batch = make_params(rng), make_batch(rng)
    return [
        cx.fisher(model(layer), loss, params, batch, linearize=keep, **options)
        for keep in (True, False)
    ]


@pytest.mark.parametrize("name", APART)
def test_gradients_are_kept_where_samples_do_not_mix(name, rng):
    with jax.enable_x64(True):
        kept, whole = pair(APART[name], rng)
        assert gradients_kept(kept) and not whole.residual_bytes
        got, want = dense(kept), dense(whole)
    assert np.abs(want).max() > 1e-4
    assert np.abs(got - want).max() <= 1e-13 * np.linalg.norm(want, 2)
    assert (float(kept.loss), float(kept.weight)) == (float(whole.loss), float(whole.weight))


@pytest.mark.parametrize("name", MIXED)
def test_gradients_are_not_kept_where_samples_mix(name, rng):
    with jax.enable_x64(True):
        kept, whole = pair(MIXED[name], rng)
        assert kept.residual_bytes and not gradients_kept(kept)
        got, want = dense(kept), dense(whole)
        assert np.abs(got - want).max() <= 1e-13 * np.linalg.norm(want, 2)
        # They do mix: the matrix of one sample's labels alone depends on the other samples.
        labels = jnp.full_like(make_batch(rng)["labels"], -100).at[2].set(1)
        params, batches = make_params(rng), [{**make_batch(rng), "labels": labels} for _ in "12345"]
        for factor, batch in enumerate(batches):
            batch["x"] = 0.1 * 4.0**factor * batch["x"]
            batch |= {name: batch[name].at[2].set(batches[0][name][2]) for name in ("x", "tokens")}
        first, *others = (dense(whole.at(params, batches=batch)) for batch in batches)
    assert max(np.abs(other - first).max() for other in others) > 1e-6 * np.abs(first).max() > 0
