"""Batches of many lengths: cut into few sizes, which changes no operator; and what that takes."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tests.operators.compilations import compiled

import curvax as cx
from curvax import losses
from curvax.operators import batches as cutting
from curvax.operators.checked_product import compiled_product

LENGTHS = (1, 9, 2, 13, 7, 21, 5, 3, 11, 6, 8, 4, 10)
CLASSES = 4
# Of all entries, relative to the largest: rounding in sums of some 500 terms.
CLOSE = {"float32": 2e-6, "float64": 1e-14}
LOSS = losses.SoftmaxCrossEntropy(lambda batch: batch[1], lambda batch: batch[2])
SQUARES = losses.MeanSquaredError(lambda batch: batch[0] @ np.ones((3, CLASSES)) / 3)


def make_batches(seed, lengths=LENGTHS, dtype="float32"):
    """Samples with labels, of which some are ignored, and weights."""
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        labels = rng.integers(0, CLASSES, n)
        labels[1::3] = -100
        x = rng.standard_normal((n, 3)).astype(dtype)
        made.append((x, labels, rng.uniform(0.1, 2, n).astype(dtype)))
    return made


def make_params(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 5), "v": (5, CLASSES)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def forward(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) @ params["v"]


def objective(params, batch):
    return LOSS(forward(params, batch), batch)


def plain(params, batch):
    """A mean over samples, which says no weight."""
    return jnp.mean(jnp.sum(jnp.sin(forward(params, batch)) ** 2, axis=1))


KINDS = {
    "plain": lambda p, b, **cut: cx.hessian(plain, p, b, **cut),
    "hessian": lambda p, b, **cut: cx.hessian(objective, p, b, **cut),
    "recomputed": lambda p, b, **cut: cx.hessian(objective, p, b, linearize=False, **cut),
    "ggn": lambda p, b, **cut: cx.ggn(forward, LOSS, p, b, **cut),
    "empirical": lambda p, b, **cut: cx.fisher(forward, LOSS, p, b, **cut),
    "exact": lambda p, b, **cut: cx.fisher(forward, LOSS, p, b, kind="exact", **cut),
    "squares": lambda p, b, **cut: cx.ggn(forward, SQUARES, p, b, **cut),
}


def truth(kind, params, batches):
    """The dense matrix in float64, from all samples in one array and no code of curvax."""
    x, labels, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, "f8"), params))
        x = jnp.asarray(x, "f8")
        weights = jnp.where(labels == -100, 0, jnp.asarray(weights, "f8"))
        index = jnp.where(labels == -100, 0, labels)

        def outputs(flat):
            return forward(unravel(flat), (x,))

        def by_sample(flat):
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs(flat)), index[:, None], 1)[:, 0]

        share = weights / weights.sum()
        if kind == "plain":
            return jax.hessian(lambda f: jnp.mean(jnp.sum(jnp.sin(outputs(f)) ** 2, 1)))(flat)
        if kind in ("hessian", "recomputed"):
            return jax.hessian(lambda f: share @ by_sample(f))(flat)
        jacobian = jax.jacobian(outputs)(flat)
        if kind == "squares":
            return 2 * jnp.einsum("nci,ncj->ij", jacobian, jacobian) / jacobian[..., 0].size
        if kind == "empirical":
            gradients = jax.jacobian(by_sample)(flat)
            return jnp.einsum("n,ni,nj->ij", share, gradients, gradients)
        p = jax.nn.softmax(outputs(flat))
        inner = jnp.einsum("nc,cd->ncd", p, jnp.eye(CLASSES)) - jnp.einsum("nc,nd->ncd", p, p)
        return jnp.einsum("n,nci,ncd,ndj->ij", share, jacobian, inner, jacobian)


def dense(op):
    return np.asarray(compiled_product(op, jnp.eye(op.shape[0], dtype=op.dtype)), np.float64)


@pytest.mark.parametrize("size", [6, 20, 64, None])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thin(5)
def test_ragged_batches_are_those_of_one_array(kind, dtype, size):
    with jax.enable_x64(dtype == "float64"):
        params, batches = make_params(dtype=dtype), make_batches(1, dtype=dtype)
        op = KINDS[kind](params, batches, microbatch_size=size)
        expected = np.asarray(truth(kind, params, batches))
        error = np.abs(dense(op) - expected).max() / np.abs(expected).max()
        assert op.dtype == dtype and op.num_batches == len(LENGTHS)
        assert error <= CLOSE[dtype]


def test_labels_are_drawn_by_the_place_of_a_sample():
    """So that pieces, whole batches, and one array of all have the same matrix."""
    params, batches = make_params(), make_batches(2)
    together = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def drawn(batches, size, seed=3):
        return dense(
            cx.fisher(forward, LOSS, params, batches, kind="mc", seed=seed, microbatch_size=size)
        )

    expected = drawn(together, None)
    scale = np.abs(expected).max()
    for size in (5, 64, None):
        assert np.abs(drawn(batches, size) - expected).max() <= 2e-6 * scale
    assert np.abs(drawn(batches, 64, seed=4) - expected).max() > 1e-2 * scale


@pytest.mark.parametrize(
    "lengths, size, sizes",
    [
        (range(8, 65), 64, {64, 16, 4, 1}),  # for 57 lengths
        (range(1, 200), 100, {100, 64, 16, 4, 1}),
        (range(20, 32), 20, {20, 4, 1}),
        (range(1, 8), 64, set(range(1, 8))),  # few as they are
        ((11, 9), 4, {4, 3, 1}),
        ((6, 6, 6), 4, {4, 2}),
        ((5, 9), None, {5, 9}),
    ],
)
def test_sizes(lengths, size, sizes):
    batches = [(np.arange(n) + 100 * i, np.full((n, 2), i)) for i, n in enumerate(lengths)]
    stacks = cutting.stack_batches(cutting.read_batches(batches, None), size, False)
    assert {stack[0].shape[1] for stack, _ in stacks} == sizes
    found = {}
    for (numbers, owners), positions in stacks:
        for piece, owner, position in zip(numbers, owners, positions, strict=True):
            assert np.all(owner == position)
            found.setdefault(position, []).append(np.asarray(piece))
    for i, (numbers, _) in enumerate(batches):
        np.testing.assert_array_equal(np.sort(np.concatenate(found[i])), numbers)


def test_few_programs_are_traced_and_compiled():
    """As many for 57 lengths as for 20, and few."""
    params, counts, traces = make_params(), [], []

    def loss(params, batch):
        traces.append(batch[0].shape)
        return plain(params, batch)

    def another(params, batch):
        return jax.tree.map(lambda x: x + 0 * x**2, plain(params, batch))

    for lengths in (range(8, 65), range(45, 65)):
        batches = make_batches(3, lengths)
        # What is compiled once for any operator of such batches.
        jax.block_until_ready(cx.hessian(another, params, batches, microbatch_size=64) @ params)
        made, op = compiled(lambda b=batches: cx.hessian(loss, params, b, microbatch_size=64))
        multiplied, _ = compiled(lambda op=op: op @ params)
        assert len(op.stacks) == 4
        counts.append((made, multiplied))
    assert {shape[0] for shape in traces} == {64, 16, 4, 1}
    # One program evaluates all sizes, and one multiplies.
    assert all(made <= 1 and multiplied <= 1 for made, multiplied in counts), counts


def test_no_length_is_compiled_again_by_at(caplog):
    """More of them than programs are kept; it is said what would spare them."""
    lengths = range(1, 36)
    with caplog.at_level("INFO", logger="curvax"):
        op = cx.hessian(lambda w, x: jnp.mean(jnp.cos(x @ w)), jnp.ones(2), _rows(0, lengths))
        cx.hessian(lambda w, x: jnp.mean(x @ w) ** 2, jnp.ones(2), _rows(0, (3, 4)))
    assert len(op.stacks) == 35
    assert [record.getMessage()[:20] for record in caplog.records] == ["batches of 35 shapes"]
    assert "microbatch_size=35 needs few" in caplog.text
    op.at(2 * jnp.ones(2))
    count, moved = compiled(lambda: op.at(3 * jnp.ones(2), batches=_rows(1, lengths)).loss)
    assert count == 0
    x = np.concatenate(_rows(1, lengths))
    np.testing.assert_allclose(moved, np.cos(3 * x.sum(1, dtype=np.float64)).mean(), rtol=1e-5)


def _rows(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, 2)).astype("f") for n in lengths]


@pytest.mark.parametrize("kind", ["plain", "empirical"])
def test_at_takes_ragged_batches_in_another_order(kind):
    op = KINDS[kind](make_params(), make_batches(4), microbatch_size=64)
    params, others = make_params(1), make_batches(5, LENGTHS[::-1])
    expected = np.asarray(truth(kind, params, others))
    error = np.abs(dense(op.at(params, batches=others)) - expected).max()
    assert error <= 2e-6 * np.abs(expected).max()
    with pytest.raises(ValueError, match="batches must be as many"):
        op.at(params, batches=make_batches(5, (*LENGTHS[1:], 2)))


def test_what_is_wrong_is_told_of_the_batch_it_is_in():
    batches = make_batches(6)
    batches[5][0][17] = np.nan
    with pytest.raises(FloatingPointError, match="on batch 5"):
        cx.hessian(plain, make_params(), batches, microbatch_size=64)
    batches = make_batches(6)
    batches[3][1][:] = -100
    with pytest.warns(UserWarning, match=r"is 0 on 1 of 13 batches \(batch 3\)"):
        cx.hessian(objective, make_params(), batches, microbatch_size=64)


class TestSeconds:
    def test_add_up_to_the_wall_time(self):
        def loss(params, batch):
            time.sleep(0.2)
            return 3 * plain(params, batch)

        start = time.perf_counter()
        op = cx.hessian(loss, make_params(), make_batches(7), microbatch_size=64)
        wall = time.perf_counter() - start
        parts = dict(op.seconds)
        total = parts.pop("total")
        assert set(parts) == {"compile", "trace", "evaluate", "host"}
        assert sum(parts.values()) == pytest.approx(total, rel=0.01)
        assert 0.9 * wall <= total <= wall
        # Each of three sizes is traced once at least.
        assert parts["trace"] >= 0.6 and parts["compile"] > 0

    def test_nothing_is_compiled_twice(self):
        op = cx.hessian(plain, make_params(), make_batches(7), microbatch_size=64)
        again = cx.hessian(plain, make_params(1), make_batches(8), microbatch_size=64)
        moved = op.at(make_params(1))
        assert again.seconds["compile"] == moved.seconds["compile"] == 0
        assert moved.seconds["trace"] == 0 < moved.seconds["evaluate"]
        assert sum(moved.seconds.values()) == pytest.approx(2 * moved.seconds["total"], rel=0.01)

    def test_finite_differences_are_tuned(self):
        start = time.perf_counter()
        op = cx.hessian(plain, make_params(), make_batches(7)[1], method="finite_difference")
        wall = time.perf_counter() - start
        assert op.seconds["tuning"] > 0
        assert sum(op.seconds.values()) == pytest.approx(2 * op.seconds["total"], rel=0.01)
        assert 0.9 * wall <= op.seconds["total"] <= wall

    def test_a_transformation_forgets_them(self):
        op = cx.ggn(forward, LOSS, make_params(), make_batches(7)[1])
        assert op.seconds and jax.tree.map(lambda leaf: leaf, op).seconds == {}
        assert jax.tree.structure(op) == jax.tree.structure(op.at(make_params(1)))


def test_an_array_is_copied_though_it_is_aligned():
    """JAX would share such memory, into which a loader may read the next batch."""
    memory = np.zeros(64 + 2 * 4096, np.uint8)
    start = -memory.ctypes.data % 64
    w, x = (memory[start + 4096 * i :][:4096].view("f").reshape(64, 16) for i in (0, 1))
    w[:], x[:] = 1, 2
    op = cx.hessian(lambda w, x: jnp.mean((w * x) ** 2), w, x, linearize=False)
    moved, v = op.at(w), np.ones((1, 1024), "f")
    w[:], x[:] = 5, 7
    for own in (op, moved):
        # With the weights of before: `at` evaluates once more what the operator holds.
        np.testing.assert_array_equal(compiled_product(own, v), v * (8 / 1024))
        np.testing.assert_allclose(own.at(own.space.unravel(own.leaves[0].ravel())).loss, 4)
