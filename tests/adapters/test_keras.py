"""Keras: the loss of `evaluate`, and the curvature of formulas written out by hand."""

import importlib.util
import operator
import os

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

os.environ.setdefault("KERAS_BACKEND", "jax")
slow = pytest.mark.slow
missing = importlib.util.find_spec("keras") is None
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(missing, reason="keras is not installed"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def network(*layers, shape=(3,), **options):
    import keras

    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), *layers], **options)


def dense(*args, **options):
    import keras

    return keras.layers.Dense(*args, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def adapted(model, *args, **options):
    from curvax.adapters import keras as adapter

    return adapter.from_model(model, *args, **options)


def evaluated(model, x, y=None, sample_weight=None):
    found = model.evaluate(
        x, y, sample_weight=sample_weight, verbose=0, batch_size=1000, return_dict=True
    )
    return found["loss"]


def dense_matrix(op):
    return np.asarray(op.product(jnp.eye(op.shape[0], dtype=op.dtype)))


def by_hand(model, loss):
    """The Hessian of `loss`, a function of the values of the trainable variables in their order."""
    flat, unravel = jax.flatten_util.ravel_pytree(
        {variable.path: variable.value for variable in model.trainable_variables}
    )
    paths = [variable.path for variable in model.trainable_variables]

    def of_flat(flat):
        params = unravel(flat)
        return loss(*[params[path] for path in paths])

    return np.asarray(jax.jit(jax.hessian(of_flat))(flat))


def compare(model, batch, by_hand_loss=None, **options):
    """The operator of a batch, after a comparison with `evaluate` and with a loss by hand."""
    op = cx.hessian(adapted(model, example=batch, **options), batch)
    parts = batch if isinstance(batch, tuple) else (batch,)
    np.testing.assert_allclose(float(op.loss), evaluated(model, *parts), rtol=2e-6)
    if by_hand_loss is not None:
        wanted = by_hand(model, by_hand_loss)
        np.testing.assert_allclose(dense_matrix(op), wanted, atol=2e-5 * np.abs(wanted).max())
    return op


def halves(batch):
    """Two batches of different sizes."""
    return [jax.tree.map(lambda x: x[:2], batch), jax.tree.map(lambda x: x[2:], batch)]


def words():
    x = np.random.default_rng(0).integers(1, 6, (3, 4))
    x[0, 2:] = x[1, 3:] = 0
    return x, (x != 0).astype(np.float32)


def embedding():
    import keras

    return keras.layers.Embedding(6, 3, mask_zero=True)


class TestMasks:
    def test_squares_of_a_sequence(self):
        x, mask = words()
        y = numbers(3, 4, 2)
        model = network(embedding(), dense(2), shape=(4,))
        model.compile(loss="mse")

        def loss(table, kernel, bias):
            errors = jnp.mean((table[x] @ kernel + bias - y) ** 2, axis=-1)
            return jnp.sum(mask * errors) / mask.sum()

        op = compare(model, (x, y), loss)
        # Pieces with other numbers of words that count are as one.
        split = cx.hessian(adapted(model), (x, y), microbatch_size=1)
        np.testing.assert_allclose(dense_matrix(split), dense_matrix(op), atol=1e-6)
        # The loss is convex in outputs that are linear in all but the table.
        where = cx.match_names("*dense*")
        whole, ggn = (make(adapted(model), (x, y), where=where) for make in (cx.hessian, cx.ggn))
        np.testing.assert_allclose(dense_matrix(ggn), dense_matrix(whole), atol=1e-6)

    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
    def test_labels_with_weights(self, reduction):
        import keras

        x, mask = words()
        y = np.random.default_rng(1).integers(0, 2, (3, 4))
        w = np.random.default_rng(2).random((3, 4)).astype(np.float32)
        model = network(embedding(), dense(2), shape=(4,))
        model.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        )

        def loss(table, kernel, bias):
            logs = jax.nn.log_softmax(table[x] @ kernel + bias)
            errors = -jnp.take_along_axis(logs, y[..., None], -1)[..., 0]
            over = mask.sum() if reduction == "sum_over_batch_size" else (w * mask).sum()
            return jnp.sum(mask * w * errors) / over

        op = compare(model, (x, y, w), loss)
        together = cx.hessian(adapted(model), halves((x, y, w)))
        np.testing.assert_allclose(dense_matrix(together), dense_matrix(op), atol=1e-6)

    @slow
    @pytest.mark.parametrize("sequences,shape", [(True, (3, 4, 1)), (False, (3, 1))])
    def test_recurrent(self, sequences, shape):
        import keras

        x, _ = words()
        layers = [embedding(), keras.layers.LSTM(2, return_sequences=sequences), dense(1)]
        model = network(*layers, shape=(4,))
        model.compile(loss="mse")
        batch = (x, numbers(*shape))
        compare(model, batch)
        assert adapted(model, example=batch).verify(hvp=True).passed

    def test_masking_of_numbers_and_two_outputs(self):
        import keras

        x = numbers(3, 4, 2)
        x[0, 2:] = 0
        masked = keras.layers.Masking()
        start = keras.Input((4, 2))
        heads = [keras.layers.TimeDistributed(dense(size)) for size in (2, 1)]
        hidden = masked(start)
        model = keras.Model(start, [heads[0](hidden), heads[1](hidden)])
        model.compile(loss=["mse", "mae"], loss_weights=[0.5, 2.0])
        batch = (x, [numbers(3, 4, 2, seed=1), numbers(3, 4, 1, seed=2)])

        def loss(k, b, m, c):
            mask = np.any(x != 0, axis=-1)
            first = ((x @ k + b - batch[1][0]) ** 2).mean(-1)
            second = jnp.abs(x @ m + c - batch[1][1]).mean(-1)
            return jnp.sum(mask * (0.5 * first + 2 * second)) / mask.sum()

        compare(model, batch, loss)
        two = halves(batch)
        with pytest.raises(ValueError, match="batches must be one batch"):
            cx.hessian(adapted(model), two)
        with pytest.raises(ValueError, match="batches must be one batch"):
            cx.hessian(adapted(model), iter(two))
        with pytest.raises(ValueError, match="leave out microbatch_size"):
            cx.hessian(adapted(model), batch, microbatch_size=2)


class TestWeights:
    @pytest.mark.parametrize("weights", [[0.25], pytest.param(0.25, marks=slow)])
    def test_of_the_loss(self, weights):
        x, y = numbers(5, 3), numbers(5, 2, seed=1)
        model = network(dense(2))
        model.compile(loss="mse", loss_weights=weights)
        compare(model, (x, y), lambda k, b: 0.25 * jnp.mean((x @ k + b - y) ** 2))

    def test_of_samples(self):
        x, y, w = numbers(6, 3), numbers(6, 2, seed=1), np.arange(6, dtype=np.float32)
        model = network(dense(2))
        model.compile(loss="mse")

        def loss(k, b):
            return jnp.sum(w * ((x @ k + b - y) ** 2).mean(-1)) / 6

        op = compare(model, (x, y, w), loss)
        together = cx.hessian(adapted(model), halves((x, y, w)))
        np.testing.assert_allclose(dense_matrix(together), dense_matrix(op), atol=1e-6)
        names = {"inputs": "x", "targets": "y", "sample_weights": "w"}
        getters = {name: operator.itemgetter(key) for name, key in names.items()}
        by_name = cx.hessian(adapted(model, **getters), {"x": x, "y": y, "w": w})
        np.testing.assert_allclose(float(by_name.loss), float(op.loss), rtol=1e-6)
        ggn = cx.ggn(adapted(model), (x, y, w))  # the outputs are linear
        np.testing.assert_allclose(dense_matrix(ggn), dense_matrix(op), atol=1e-6)
        with pytest.raises(TypeError, match="Fisher matrix is not known of a loss with masks"):
            cx.fisher(adapted(model), (x, y, w))
        for bad in (-1.0, np.nan):
            with pytest.raises(ValueError, match=f"finite and not negative, got {bad:g}"):
                cx.hessian(adapted(model), (x, y, np.where(w == 3, np.float32(bad), w)))

    @pytest.mark.parametrize("form", ["labels", pytest.param("column", marks=slow), "one hot"])
    def test_of_classes(self, form):
        import keras

        x, labels = numbers(6, 3), np.array([0, 1, 2, 0, 1, 0])
        w = np.array([0.5, 2.0, 1.0])[labels].astype(np.float32)
        kinds = keras.losses.CategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy
        loss = kinds[form != "one hot"](from_logits=True)
        y = {"labels": labels, "column": labels[:, None], "one hot": np.eye(3)[labels]}[form]
        y = y.astype(np.float32) if form == "one hot" else y
        model = network(dense(3))
        model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
        op = cx.hessian(adapted(model, class_weight={0: 0.5, 1: 2.0}, example=(x, y)), (x, y))
        weighted = cx.hessian(adapted(model), (x, y, w))
        np.testing.assert_allclose(dense_matrix(op), dense_matrix(weighted), atol=1e-6)
        trained = model.train_on_batch(x, y, class_weight={0: 0.5, 1: 2.0})
        np.testing.assert_allclose(float(op.loss), trained, rtol=1e-5)
        with pytest.raises(ValueError, match="exclude each other"):
            adapted(model, class_weight={0: 0.5}, example=(x, y, w))


class TestSeveral:
    def two(self):
        import keras

        first, second = keras.Input((3,), name="left"), keras.Input((2,), name="right")
        both = keras.layers.Concatenate()([first, second])
        heads = {"a": dense(2, name="a")(both), "b": dense(1, name="b")(both)}
        return keras.Model([first, second], heads)

    @pytest.mark.parametrize("given", ["compiled", pytest.param("loss=", marks=slow)])
    def test_inputs_and_outputs_by_name(self, given):
        model = self.two()
        x = [numbers(5, 3), numbers(5, 2, seed=1)]
        y = {"a": numbers(5, 2, seed=2), "b": numbers(5, 1, seed=3)}
        weights = None if given == "loss=" else {"b": 0.5, "a": 3.0}
        model.compile(
            loss={"b": "log_cosh", "a": "mse"}, loss_weights=weights, metrics={"a": "mae"}
        )
        scale = (1.0, 1.0) if weights is None else (3.0, 0.5)

        def loss(k, b, m, c):
            whole = np.concatenate(x, axis=1)
            second = whole @ m + c - y["b"]
            first = jnp.mean((whole @ k + b - y["a"]) ** 2)
            return scale[0] * first + scale[1] * jnp.mean(jnp.log(jnp.cosh(second)))

        options = {"loss": {"a": "mse", "b": "log_cosh"}} if given == "loss=" else {}
        op = compare(model, (x, y), loss, **options)
        together = cx.hessian(adapted(model, **options), halves((x, y)))
        np.testing.assert_allclose(dense_matrix(together), dense_matrix(op), atol=1e-5)

    @slow
    def test_list_and_an_output_without_loss(self):
        model = self.two()
        x = [numbers(5, 3), numbers(5, 2, seed=1)]
        y = {"a": numbers(5, 2, seed=2), "b": numbers(5, 1, seed=3)}
        model.compile(loss=[None, "mse"], loss_weights=[None, 0.5])
        op = cx.hessian(adapted(model, example=(x, y)), (x, y))
        np.testing.assert_allclose(float(op.loss), evaluated(model, x, y), rtol=2e-6)
        assert not op.ravel(op @ op.unravel(jnp.eye(op.shape[0])[0])).any()  # of the other one

    def test_function_that_the_model_was_compiled_with(self):
        import keras

        x, y = numbers(5, 3), numbers(5, 2, seed=1)
        model = network(dense(2))
        model.compile(loss=lambda true, pred: keras.ops.sum((2 * true - pred) ** 4, axis=-1))
        compare(model, (x, y), lambda k, b: jnp.mean(jnp.sum((2 * y - x @ k - b) ** 4, -1)))


class TestAdded:
    def test_regularisers(self):
        x, y = numbers(5, 3), numbers(5, 2, seed=1)
        model = network(dense(2, kernel_regularizer="l2", activity_regularizer="l2"))
        model.compile(loss="mse")

        def loss(k, b):
            out = x @ k + b
            return jnp.mean((out - y) ** 2) + 0.01 * (k**2).sum() + 0.01 * (out**2).sum() / 5

        op = compare(model, (x, y), loss)
        together = cx.hessian(adapted(model), halves((x, y)))
        np.testing.assert_allclose(dense_matrix(together), dense_matrix(op), atol=1e-6)
        own = adapted(model, loss=lambda out, batch: jnp.mean((out - batch[1]) ** 2))
        np.testing.assert_allclose(float(cx.hessian(own, (x, y)).loss), float(op.loss), rtol=1e-6)

    def test_gauss_newton_has_the_regularisers_curvature(self):
        x, y = numbers(5, 3), np.array([0, 1, 1, 0, 1])
        model = network(dense(2, kernel_regularizer="l2"))
        loss = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])
        model.compile(loss="mse")
        own = adapted(model, loss=loss, example=(x, y))
        matrices = [dense_matrix(make(own, (x, y))) for make in (cx.hessian, cx.ggn)]
        np.testing.assert_allclose(*matrices, atol=1e-6)

    def test_add_loss_alone(self):
        import keras

        class Penalty(keras.layers.Layer):
            def call(self, x):
                self.seen = x
                self.add_loss(keras.ops.mean(x**4))
                return x

        x = numbers(5, 3)
        model = network(dense(2), Penalty())
        model.compile()
        compare(model, x, lambda k, b: jnp.mean((x @ k + b) ** 4))
        compare(model, (x,))
        plain = network(dense(2))
        plain.compile()
        with pytest.raises(ValueError, match="no loss that it was compiled with.*adds none"):
            adapted(plain, example=x)

    def test_compute_loss_of_a_class(self):
        import keras

        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = dense(2)
                self.seen = keras.metrics.Mean(name="seen")

            def call(self, x):
                return self.dense(x)

            def compute_loss(self, x, y, y_pred, sample_weight, training=True):
                loss = keras.ops.mean((y - y_pred) ** 2) + keras.ops.sum(self.dense.kernel**4)
                self.seen.update_state(loss)
                return loss

        keras.utils.set_random_seed(0)
        x, y = numbers(5, 3), numbers(5, 2, seed=1)
        model = Own()
        model(x)
        model.compile()
        compare(model, (x, y), lambda k, b: jnp.mean((x @ k + b - y) ** 2) + jnp.sum(k**4))

        class Stepping(Own):
            def train_step(self, state, data):
                raise AssertionError

        stepping = Stepping()
        stepping(x)
        stepping.compile(loss="mse")
        with pytest.raises(ValueError, match="Stepping, has a train_step of its own"):
            adapted(stepping)
        given = adapted(stepping, loss="mse", example=(x, y))
        wanted = jnp.mean((stepping(x) - y) ** 2)
        np.testing.assert_allclose(float(cx.hessian(given, (x, y)).loss), wanted, rtol=1e-6)


def test_custom_gradient():
    """The Hessian is the derivative of the gradient that Keras trains with."""
    import keras

    @keras.ops.custom_gradient
    def tripled(x):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            return 3 * upstream * x

        return x, gradient

    class Tripled(keras.layers.Layer):
        def call(self, x):
            return tripled(x)

    x, y = numbers(5, 3), numbers(5, 2, seed=1)
    model = network(dense(2), Tripled())
    model.compile(loss="mse")
    op = cx.hessian(adapted(model, example=(x, y)), (x, y))
    np.testing.assert_allclose(float(op.loss), evaluated(model, x, y), rtol=2e-6)
    kernel, bias = (variable.value for variable in model.trainable_variables)

    def gradient(k, b):
        out = x @ k + b
        back = 3 * out * 2 * (out - y) / out.size
        return x.T @ back, back.sum(0)

    flat, unravel = jax.flatten_util.ravel_pytree((kernel, bias))
    wanted = jax.jacobian(lambda flat: jax.flatten_util.ravel_pytree(gradient(*unravel(flat)))[0])(
        flat
    )
    order = np.r_[6:8, :6]  # by paths the bias is first
    np.testing.assert_allclose(dense_matrix(op), wanted[order][:, order].T, atol=1e-5)
