"""Which models keep samples apart, and the gradients that are kept of them."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.operators.fisher_problems import (
    CASES,
    EPS,
    assert_is,
    dense,
    labels_of,
    logits,
    small_params,  # noqa: F401 - the fixture
    truth,
)
from tests.operators.fisher_problems import make_batch as make_labelled
from tests.operators.sample_problems import APART, MIXED, SAMPLES, make_batch, make_params, model

import curvax as cx
from curvax.models import gpt
from curvax.operators.checked_product import compiled_product
from curvax.operators.closure import close
from curvax.operators.model_of_sample import tell_unknown
from curvax.operators.sample_rules import MixedError, Sample, Value
from curvax.operators.samples import evaluated

ours = cx.losses.SoftmaxCrossEntropy(lambda batch: batch["labels"])


def gradients_kept(op, samples=SAMPLES):
    assert op.gradients_kept == ("gradients kept" in repr(op))
    return op.gradients_kept and op.residual_bytes == samples * op.shape[0] * op.dtype.itemsize


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


@pytest.mark.parametrize("case", ["any loss", "fused object", "no logits", "no logits, no bias"])
def test_losses(case, params, rng):
    """Masked labels, samples without any, weights, ragged batches, blocks, other parameters."""
    forward, loss = CASES[case]
    if case == "no logits, no bias":
        params = {**params, "b": jnp.zeros_like(params["b"])}
    weights = case.startswith(("fused", "no"))
    batches = [make_labelled(rng, 4, length, weights=weights) for length in (40, 40, 60)]
    batches[2] = jax.tree.map(lambda x: x[:3], batches[2])
    op = cx.fisher(forward, loss, params, batches)
    assert gradients_kept(op, 11)
    split = cx.fisher(forward, loss, params, batches, microbatch_size=2)
    assert gradients_kept(split, 11)
    named = cx.match_names("w" if case == "no logits, no bias" else "*")
    want = truth(logits, params, batches)
    if case == "no logits, no bias":
        op, split = (
            cx.fisher(forward, loss, params, batches, where=named, microbatch_size=size)
            for size in (None, 2)
        )
        want = want[-40:, -40:]
    assert_is(op, want)
    assert_is(split, want)
    block = jax.random.normal(jax.random.key(0), (3, op.shape[0]))
    expected = np.asarray(block, np.float64) @ want
    got = np.asarray(compiled_product(op, block), np.float64)
    assert np.linalg.norm(got - expected) <= 16 * EPS * np.linalg.norm(expected)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    assert_is(op.at(moved), truth(logits, moved, batches)[-op.shape[0] :, -op.shape[0] :])


@pytest.mark.parametrize("kind", ["empirical", "mc"])
def test_mean_squared_error(kind, rng):
    def forward(params, batch):
        return model(APART["layers"])(params, batch)[..., 0]

    loss = cx.losses.MeanSquaredError(
        lambda batch: jnp.sin(batch["x"][..., 0]), lambda batch: batch["x"][:, 0, 0] ** 2
    )
    options = {"kind": kind, "seed": 3 if kind == "mc" else None}
    with jax.enable_x64(True):
        params, batch = make_params(rng), make_batch(rng)
        kept, whole = (
            cx.fisher(forward, loss, params, batch, linearize=keep, **options)
            for keep in (True, False)
        )
        assert gradients_kept(kept)
        got, want = dense(kept), dense(whole)
    assert np.abs(got - want).max() <= 1e-13 * np.linalg.norm(want, 2)


@pytest.mark.parametrize("draws", [1, 2])
def test_draws(draws, rng):
    """The labels are those of the whole batch's samples, whose numbers they are drawn by."""
    with jax.enable_x64(True):
        kept, whole = pair(APART["heads"], rng, kind="mc", num_samples=draws, seed=3)
        assert gradients_kept(kept, SAMPLES * draws)
        got, want = dense(kept), dense(whole)
    assert np.abs(got - want).max() <= 1e-13 * np.linalg.norm(want, 2)


def test_labels_of_other_samples(rng):
    """Labels and weights are those of the whole batch, of which a sample has a row."""
    shares = cx.losses.SoftmaxCrossEntropy(
        lambda b: b["labels"], lambda b: b["x"][..., 0] ** 2 * jnp.arange(1.0, 7)[:, None]
    )
    shifted = cx.losses.SoftmaxCrossEntropy(lambda b: b["labels"][::-1])
    normalised = cx.losses.SoftmaxCrossEntropy(
        labels_of, lambda b: jnp.abs(b["x"][..., 0]) / jnp.sum(b["x"] ** 2)
    )
    with jax.enable_x64(True):
        kept, whole = pair(APART["layers"], rng, loss=shares)
        assert gradients_kept(kept)
        assert np.abs(dense(kept) - dense(whole)).max() <= 1e-13 * np.linalg.norm(dense(whole), 2)
        for loss in (shifted, normalised):
            assert not pair(APART["layers"], rng, loss=loss)[0].gradients_kept


def test_what_is_not_known_is_said_once(rng, caplog):
    class Own(cx.losses.SoftmaxCrossEntropy):
        pass

    tell_unknown.cache_clear()
    caplog.set_level(logging.INFO, "curvax")
    for _ in range(2):
        assert not pair(APART["layers"], rng, loss=Own(labels_of))[0].gradients_kept
    assert not pair(lambda p, x, b: x + jnp.fft.ifft(jnp.fft.fft(x)).real, rng)[0].gradients_kept
    assert not pair(MIXED["batch norm"], rng)[0].gradients_kept
    own, fft = [record.getMessage() for record in caplog.records]
    assert "for the loss's own method fisher_product" in own and "microbatch_size=1" in own
    assert "for fft" in fft
    # Nor is it said where gradients would be the longer, or memory is not to be used.
    tell_unknown.cache_clear()
    caplog.clear()
    params, batch = make_params(rng), make_batch(rng)
    cx.fisher(model(APART["layers"]), Own(labels_of), params, batch, linearize=False)
    wide = {"in": jnp.tile(params["in"], (1, 64))}
    cx.fisher(lambda p, b: (b["x"] @ p["in"])[..., :3], Own(labels_of), wide, batch)
    assert not caplog.records


def test_axes_of_length_one_are_not_taken_for_the_samples():
    """An operand of an elementwise equation may have length 1 where another has the samples."""
    x = jnp.ones((SAMPLES, 1))
    program = close(lambda x, y: jax.lax.mul(x, y), x, x.T)
    sample = Sample(SAMPLES, jnp.asarray(2))
    with pytest.raises(MixedError, match="mul"):
        evaluated(sample, program, [Value(x[:1], 0), Value(x.T[:, :1], 1)])
    (one,) = evaluated(sample, program, [Value(x[:1], 0), Value(x.T)])
    assert (one.axis, one.array.shape) == (0, (1, SAMPLES))


def test_the_shipped_model_keeps_gradients_by_default():
    """No product of matrices but those with the gradients is left in a product."""
    with jax.numpy_rank_promotion("allow"):
        operator = cx.fisher(*gpt.make_problem())
    n = operator.shape[0]
    assert operator.rank_bound == 16 and cx.plan(operator, 10).max_basis == 20
    assert gradients_kept(operator, 16) and operator.residual_bytes == 16 * n * 4
    lowered = jax.jit(lambda op, v: op.product(v)).lower(operator, jnp.ones((1, n)))
    # Two passes, of a product and a sum for each number; a pass through the model has 7e8 more.
    assert 4 * 16 * n <= lowered.compile().cost_analysis()["flops"] <= 4.5 * 16 * n


@pytest.mark.parametrize("kind, draws", [("empirical", 1), ("mc", 2)])
def test_a_basis_has_room_for_no_more_than_the_rank(kind, draws):
    """Over ragged batches and microbatches; all that is not zero is found in it, and what is."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((11, 60, 20))
    w = jnp.asarray(rng.standard_normal((20, 40)), jnp.float32)
    loss = cx.losses.SoftmaxCrossEntropy(lambda batch: jnp.argmax(batch, -1))
    options = {"num_samples": draws, "seed": 1} if kind == "mc" else {}
    op = cx.fisher(
        lambda w, x: jnp.tanh(x @ w),
        loss,
        w,
        [jnp.asarray(part, jnp.float32) for part in (x[:5], x[5:8], x[8:])],
        kind=kind,
        microbatch_size=2,
        **options,
    )
    assert op.gradients_kept and op.rank_bound == 11 * draws
    assert cx.hessian(lambda w, x: jnp.mean(jnp.tanh(x @ w)), w, x[0]).rank_bound == 800
    dense = np.asarray(op.product(jnp.eye(op.shape[0])), np.float64)
    truth = np.linalg.eigvalsh((dense + dense.T) / 2)[::-1]
    assert truth[11 * draws] < 1e-6 * truth[0] < truth[11 * draws - 1]
    for k in (3, 11 * draws + 2):
        result = cx.eigsh(op, k, tol=1e-5, seed=0)
        assert result.all_converged
        np.testing.assert_allclose(result.eigenvalues, truth[:k], atol=2e-6 * truth[0])
