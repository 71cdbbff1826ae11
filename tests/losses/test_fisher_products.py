"""Fisher matrices on the outputs: draws, memory, large blocks and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import losses
from curvax.losses.softmax_ce import draw_labels
from curvax.ops.softmax_ce import Options

EPS = 2.0**-23
GB = 1e9


def labels_of(batch):
    return batch["labels"]


def weights_of(batch):
    return batch.get("weights")


def keys_of(seed, *shape):
    return jax.random.split(jax.random.key(seed), shape)


@pytest.fixture
def problem(rng):
    """Outputs of each class and a batch: 3 samples of 2 labels, one of them ignored."""
    hidden, head, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 2, 4), (5, 4), (5,)]
    )
    batch = {
        "labels": np.asarray([[0, 4], [-100, 2], [1, 3]], np.int32),
        "weights": jnp.asarray(rng.uniform(0.1, 2, (3, 2)), jnp.float32),
    }
    logits = hidden @ head.T + bias[None, None]
    options = {"softcap": 2.0, "z_loss": 0.3, "label_smoothing": 0.2}
    targets = {**batch, "labels": jnp.full((3, 2, 5), 9.0)}
    return {
        "softmax": (losses.SoftmaxCrossEntropy(labels_of, weights_of, **options), logits, batch),
        "linear": (
            losses.LinearCrossEntropy(labels_of, weights_of, chunk=4, **options),
            (hidden, head, bias),
            batch,
        ),
        "squares": (losses.MeanSquaredError(labels_of, weights_of), logits, targets),
    }


def dense(loss, outputs, batch, kind, keys=None):
    """The matrix on the outputs, seen as one vector."""
    leaves, treedef = jax.tree.flatten(outputs)
    borders = np.cumsum([leaf.size for leaf in leaves])

    def column(flat):
        parts = jnp.split(flat, borders[:-1])
        u = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        out = loss.fisher_product(outputs, batch, jax.tree.unflatten(treedef, u), kind, keys)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(out)])

    return jax.vmap(column)(jnp.eye(borders[-1], dtype=jnp.float32))


@pytest.mark.parametrize("case", ["softmax", "linear", "squares"])
def test_draws_are_unbiased(case, problem):
    """Means of S draws are as far from the expectation as the spread of the draws says."""
    loss, outputs, batch = problem[case]
    exact = np.asarray(dense(loss, outputs, batch, "exact"), np.float64)
    draw = jax.jit(lambda keys: jax.lax.map(lambda k: dense(loss, outputs, batch, "mc", k), keys))
    draws = np.asarray(draw(keys_of(1, 4096, 3)), np.float64)
    spread = np.sqrt(np.mean(np.sum((draws - exact) ** 2, axis=(1, 2))))
    assert spread >= 0.1 * np.linalg.norm(exact)
    for count in (256, 4096):
        error = np.linalg.norm(draws[:count].mean(0) - exact)
        assert spread / np.sqrt(count) / 4 <= error <= 4 * spread / np.sqrt(count)


def test_frequencies_of_drawn_labels():
    """Of one row of logits; a class masked by -inf is never drawn, an ignored label stays."""
    row = jnp.asarray([0.3, -jnp.inf, 1.2, -2.0, 0.0], jnp.float32)
    labels = jnp.zeros(20001, jnp.int32).at[7].set(-100)
    logits = jnp.broadcast_to(row, (20001, 5))
    drawn = np.asarray(draw_labels(logits, labels, keys_of(0, 20001), Options()))
    assert drawn[7] == -100
    frequencies = np.bincount(np.delete(drawn, 7), minlength=5) / 20000
    p = np.asarray(jax.nn.softmax(row), np.float64)
    assert frequencies[1] == 0
    assert np.all(np.abs(frequencies - p) <= 4 * np.sqrt(p * (1 - p) / 20000))


@pytest.mark.parametrize("kind", ["empirical", "mc"])
def test_large_blocks(kind, rng):
    """A sum that XLA:CPU fuses wrongly shows only above 32768 elements."""
    loss = losses.SoftmaxCrossEntropy(labels_of)
    logits, u = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(90, 3, 50), (6, 90, 3, 50)]
    )
    batch = {"labels": rng.integers(0, 50, (90, 3)).astype(np.int32)}
    keys = keys_of(0, 90) if kind == "mc" else None

    def product(u):
        return loss.fisher_product(logits, batch, u, kind, keys)

    got = np.asarray(jax.jit(jax.vmap(product))(u))
    want = np.asarray(jax.lax.map(product, u))
    assert np.abs(got - want).max() <= 16 * EPS * np.abs(want).max()


def fisher_memory(kind, block):
    """Temporary bytes of products with 16384 labels, width 768 and 50304 classes."""
    rows, width, vocab = 16384, 768, 50304
    loss = losses.LinearCrossEntropy(labels_of)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def product(hidden, head, labels, keys, u, v):
        keys = jax.random.wrap_key_data(keys) if kind == "mc" else None

        def one(u, v):
            return loss.fisher_product((hidden, head), {"labels": labels}, (u, v), kind, keys)

        return jax.vmap(one)(u, v) if block else one(u, v)

    axis = (block,) if block else ()
    args = [array(16, rows // 16, width), array(vocab, width)]
    args += [array(16, rows // 16, dtype=jnp.int32), array(16, 2, dtype=jnp.uint32)]
    args += [array(*axis, 16, rows // 16, width), array(*axis, vocab, width)]
    compiled = jax.jit(product).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("kind,limit", [("empirical", 0.2), ("mc", 0.35)])
def test_no_logits(kind, limit):
    """All logits would be 3.3 GB; a chunk of 256 rows is 51 MB."""
    assert fisher_memory(kind, 0) <= limit * GB


@pytest.mark.usefixtures("native_kernels")
def test_no_logits_of_a_block():
    hidden_tangents = 4 * 4 * 16384 * 768
    assert fisher_memory("empirical", 4) - 2 * hidden_tangents <= 0.54 * GB


def test_bad_arguments(problem):
    loss, outputs, batch = problem["softmax"]
    for entry in problem.values():
        with pytest.raises(ValueError, match=r"kind must be one of .*'exact'.*got 'true'"):
            entry[0].fisher_product(entry[1], entry[2], entry[1], "true", None)
        with pytest.raises(ValueError, match=r"needs keys of shape \(3,\), .* got none"):
            entry[0].fisher_product(entry[1], entry[2], entry[1], "mc", None)
    with pytest.raises(ValueError, match=r"keys of shape \(3,\), .* got shape \(4,\)"):
        loss.fisher_product(outputs, batch, outputs, "mc", keys_of(0, 4))
    one = {"labels": jnp.int32(2)}
    with pytest.raises(ValueError, match=r"logits must have the samples on a leading axis"):
        loss.fisher_product(outputs[0, 0], one, outputs[0, 0], "empirical", None)
    with pytest.raises(ValueError, match=r"outputs must have the samples on a leading axis"):
        losses.MeanSquaredError(labels_of).fisher_product(
            jnp.float32(1), {"labels": jnp.float32(1)}, jnp.float32(1), "empirical", None
        )
