"""The Hessian operator: products against dense float64, and means that weigh correctly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx

# An fp32 product of this two-layer model: a few hundred roundings of size eps.
FP32 = 2e-6


def model_loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(jnp.dot(x, params["w1"]) + params["b1"][None])
    logits = jnp.dot(hidden, params["w2"][0]) * params["w2"][1]
    return jnp.mean(
        jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, y[:, None], -1)[:, 0]
    )


def masked_loss(params, batch):
    x, y, mask = batch
    hidden = jnp.tanh(jnp.dot(x, params["w1"]) + params["b1"][None])
    logits = jnp.dot(hidden, params["w2"][0]) * params["w2"][1]
    each = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, y[:, None], -1)[:, 0]
    weight = jnp.sum(mask)
    return jnp.sum(mask * each) / weight, weight


def _problem(samples=23, dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(5, 7)).astype(dtype) / 2,
        "b1": rng.normal(size=7).astype(dtype) / 2,
        "w2": [rng.normal(size=(7, 3)).astype(dtype) / 2, np.asarray(1.5, dtype)],
    }
    batch = (rng.normal(size=(samples, 5)).astype(dtype), rng.integers(0, 3, samples))
    return params, batch


def _dense(loss, params, batch):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        batch = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if x.dtype.kind == "f" else jnp.asarray(x), batch
        )
        flat, unravel = ravel_pytree(wide)
        return np.asarray(jax.hessian(lambda f: loss(unravel(f), batch))(flat))


def _matrix(op):
    eye = jnp.eye(op.shape[0], dtype=op.dtype)
    return np.asarray(jax.jit(lambda op, block: op.product(block))(op, eye))


def _error(op, dense):
    return np.abs(_matrix(op) - dense).max() / np.abs(dense).max()


@pytest.mark.parametrize("linearize", [True, False, "auto"])
def test_against_dense_float64(linearize):
    params, batch = _problem()
    op = cx.hessian(model_loss, params, batch, linearize=linearize)
    assert op.shape == (64, 64) and op.dtype == np.float32
    assert _error(op, _dense(model_loss, params, batch)) <= FP32


def test_float64_is_exact_to_rounding():
    params, batch = _problem(dtype=np.float64)
    with jax.enable_x64(True):
        op = cx.hessian(model_loss, params, batch)
        assert op.dtype == np.float64
        assert _error(op, _dense(model_loss, params, batch)) <= 1e-14


def _ragged(batch, sizes):
    borders = np.cumsum([0, *sizes])
    return [
        jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
        for a, b in zip(borders[:-1], borders[1:], strict=True)
    ]


@pytest.mark.thin(4)
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize(
    "sizes, microbatch", [((23,), 4), ((10, 10, 3), None), ((1, 22), 5), ((8, 8, 7), 8)]
)
def test_ragged_and_microbatches_equal_the_single_batch(sizes, microbatch, linearize):
    params, batch = _problem()
    dense = _dense(model_loss, params, batch)
    op = cx.hessian(
        model_loss, params, _ragged(batch, sizes), microbatch_size=microbatch, linearize=linearize
    )
    assert _error(op, dense) <= 1e-6
    single = cx.hessian(model_loss, params, batch)
    np.testing.assert_allclose(op.loss, single.loss, rtol=1e-6)


@pytest.mark.thin(4)
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("microbatch", [None, 3, 6])
def test_masked_labels_weigh_by_their_count(microbatch, linearize):
    """Including microbatches with no label left, whose own mean is 0/0."""
    params, (x, y) = _problem()
    mask = (np.random.default_rng(1).random(len(y)) < 0.4).astype(np.float32)
    mask[6:12] = 0
    batch = (x, y, mask)
    dense = _dense(lambda p, b: masked_loss(p, b)[0], params, batch)
    op = cx.hessian(
        masked_loss, params, _ragged(batch, (12, 11)), microbatch_size=microbatch,
        linearize=linearize,
    )  # fmt: skip
    assert _error(op, dense) <= 1e-6


def test_generator_is_read_once():
    params, batch = _problem()
    reads = []

    def batches():
        for piece in _ragged(batch, (10, 13)):
            reads.append(len(piece[1]))
            yield piece

    op = cx.hessian(model_loss, params, batches())
    first, second = _matrix(op), _matrix(op)
    assert reads == [10, 13]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "where",
    [
        cx.match_names("w*"),
        cx.match_regex(r"^w1$", r"w2\.\d"),
        lambda name, leaf: name != "b1",
        {"w1": True, "b1": False, "w2": [True, True]},
    ],
    ids=["names", "regex", "predicate", "mask"],
)
def test_filters_give_the_diagonal_block(where):
    params, batch = _problem()
    op = cx.hessian(model_loss, params, batch, where=where)
    keep = np.r_[7:64]  # b1 comes first in the order of ravel_pytree
    assert _error(op, _dense(model_loss, params, batch)[np.ix_(keep, keep)]) <= FP32
    vector = op.unravel(jnp.arange(57.0))
    assert vector["b1"] is None and vector["w1"].shape == (5, 7)
    product = op @ vector
    assert jax.tree.structure(product) == jax.tree.structure(vector)


def test_integer_leaves_that_are_not_selected():
    params, batch = _problem()
    params["steps"] = np.arange(3)
    op = cx.hessian(model_loss, params, batch, where=cx.match_names("w1"))
    assert op.shape == (35, 35)


def test_low_precision_parameters_are_widened_once():
    params, batch = _problem()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), half)
    op = cx.hessian(model_loss, half, batch)
    assert op.dtype == np.float32
    assert _error(op, _dense(model_loss, wide, batch)) <= FP32


def test_products_inside_jit_vmap_and_scan():
    params, batch = _problem()
    op = cx.hessian(model_loss, params, batch)
    dense = _dense(model_loss, params, batch)
    vectors = np.random.default_rng(2).normal(size=(4, 64)).astype(np.float32)
    block = op.unravel(jnp.asarray(vectors))
    expected = vectors @ dense
    scale = np.abs(expected).max()

    def flat(tree):
        return np.asarray(op.space.ravel(tree, batch_axes=1))

    inside_jit = jax.jit(lambda op, v: op @ v)(op, block)
    inside_vmap = jax.vmap(lambda v: op @ v)(block)
    inside_scan = jax.lax.scan(lambda c, v: (c, op @ v), 0, block)[1]
    inside_both = jax.jit(jax.vmap(lambda v: op.matvec(v)))(block)
    for result in (op @ block, inside_jit, inside_vmap, inside_scan, inside_both):
        assert np.abs(flat(result) - expected).max() <= FP32 * scale


def test_arrays_that_the_loss_closes_over_are_arguments():
    params, batch = _problem()
    closed_over = jnp.asarray(batch[0])

    def loss(params, labels):
        return model_loss(params, (closed_over, labels))

    op = cx.hessian(loss, params, batch[1])
    assert any(leaf is closed_over for leaf in jax.tree.leaves(op))
    lowered = jax.jit(lambda op, v: op.product(v)).lower(op, jnp.ones((1, 64)))
    assert 'dense<"0x' not in lowered.as_text()


def test_parameters_are_not_kept_twice():
    """Residuals that are inputs of the primal half are put back, not copied."""
    params, batch = _problem()
    op = cx.hessian(model_loss, params, batch, linearize=True)
    shapes = [leaf.shape[1:] for stack in op.stacks for leaf in stack.product.residuals]
    assert (5, 7) not in shapes and (23, 5) not in shapes


def test_custom_vjp_falls_back_to_reverse_over_reverse():
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))

    def loss(p, batch):
        return jnp.sum(square(p["w"]) ** 2) * jnp.mean(batch)

    w = np.arange(1, 6, dtype=np.float32)
    for linearize in (True, False):
        op = cx.hessian(loss, {"w": w}, np.ones(3, np.float32), linearize=linearize)
        np.testing.assert_allclose(_matrix(op), np.diag(12 * w**2), rtol=1e-6, atol=1e-4)


def test_scipy_round_trip():
    params, batch = _problem()
    op = cx.hessian(model_loss, params, batch)
    dense = _dense(model_loss, params, batch)
    scipy_op = op.to_scipy()
    columns = np.random.default_rng(3).normal(size=(64, 3)).astype(np.float32)
    assert scipy_op.shape == (64, 64) and scipy_op.dtype == np.float32
    scale = np.abs(dense @ columns).max()
    assert np.abs(scipy_op @ columns - dense @ columns).max() <= FP32 * scale
    assert np.abs(scipy_op.matvec(columns[:, 0]) - dense @ columns[:, 0]).max() <= FP32 * scale


class TestBadInput:
    def test_empty_batches(self):
        params, _ = _problem()
        for empty in ([], iter([])):
            with pytest.raises(ValueError, match="at least one batch"):
                cx.hessian(model_loss, params, empty)
        with pytest.raises(ValueError, match="batch 1 is empty"):
            _, batch = _problem()
            cx.hessian(
                model_loss, params, [batch, (np.zeros((0, 5), np.float32), np.zeros(0, int))]
            )

    @pytest.mark.parametrize("dtype", [np.int32, np.complex64])
    def test_parameters_that_are_not_real_floats(self, dtype):
        params, batch = _problem()
        params["w1"] = params["w1"].astype(dtype)
        with pytest.raises(TypeError, match=f"'w1' must be of a real floating.*{np.dtype(dtype)}"):
            cx.hessian(model_loss, params, batch)

    def test_float64_parameters_without_x64(self):
        params, batch = _problem(dtype=np.float64)
        with pytest.raises(ValueError, match="jax_enable_x64"):
            cx.hessian(model_loss, params, batch)

    def test_loss_that_is_not_a_scalar(self):
        params, batch = _problem()
        with pytest.raises(ValueError, match=r"scalar mean, got shape \(23, 7\)"):
            cx.hessian(lambda p, b: jnp.dot(b[0], p["w1"]), params, batch)
        with pytest.raises(TypeError, match="int32"):
            cx.hessian(lambda p, b: jnp.sum(b[1]), params, batch)
        with pytest.raises(TypeError, match="callable"):
            cx.hessian(3.0, params, batch)

    def test_loss_that_is_not_finite(self):
        params, batch = _problem()
        pieces = _ragged(batch, (10, 13))
        pieces[1][0][4, 2] = np.nan
        for linearize in (True, False):
            with pytest.raises(FloatingPointError, match="nan on batch 1"):
                cx.hessian(model_loss, params, pieces, linearize=linearize)

    def test_all_labels_masked(self):
        params, (x, y) = _problem()
        with pytest.raises(ValueError, match="positive sum"):
            cx.hessian(masked_loss, params, (x, y, np.zeros(23, np.float32)))

    def test_filter_that_matches_nothing_names_the_nearest(self):
        params, batch = _problem()
        with pytest.raises(ValueError, match=r"'w3' matches no name.*'w[12]"):
            cx.hessian(model_loss, params, batch, where=cx.match_names("w3"))
        with pytest.raises(ValueError, match="names begin with 'b1'"):
            cx.hessian(model_loss, params, batch, where=lambda name, leaf: False)

    def test_mask_of_another_structure(self):
        params, batch = _problem()
        with pytest.raises(ValueError, match="structure of params"):
            cx.hessian(model_loss, params, batch, where={"w1": True})
        with pytest.raises(TypeError, match="predicate"):
            cx.hessian(model_loss, params, batch, where="w1")

    @pytest.mark.parametrize("size, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)])
    def test_microbatch_size(self, size, error):
        params, batch = _problem()
        with pytest.raises(error, match="microbatch_size"):
            cx.hessian(model_loss, params, batch, microbatch_size=size)

    def test_vector_of_another_shape_names_the_leaf(self):
        params, batch = _problem()
        op = cx.hessian(model_loss, params, batch)
        wrong = dict(params, w1=np.zeros((5, 6), np.float32))
        with pytest.raises(ValueError, match=r"leaf 'w1'.*\(5, 7\), got \(5, 6\)"):
            op @ wrong
        with pytest.raises(ValueError, match="structure"):
            op @ {"w1": params["w1"]}


@pytest.mark.parametrize("width", [5, 4, 7])
def test_float64_products_as_xla_compiles_them(width):
    """Against the closed form; jaxlib 0.10.2's default for AVX-512 is wrong at width 5."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, v = (jnp.asarray(rng.standard_normal((4, width))) for _ in range(2))
        t = jnp.asarray(rng.standard_normal((4, 2 * width)))

        def loss(x, t):
            return jnp.mean((jnp.concatenate([x, x * x], -1) - t) ** 2)

        wanted = (v + 2 * v * (x * x - t[:, width:]) + 4 * x * x * v) / (4 * width)
        np.testing.assert_allclose(cx.hessian(loss, x, t) @ v, wanted, rtol=0, atol=1e-14)
